"""Where a training step's time goes, by kind of operation.

    python benchmarks/profile_step.py --model .cache/models/smollm2-135m-instruct

One micro-batch (prefill, forward, backward) of our trainer and of the hand-written loop, 512 prompt
and 64 response tokens a conversation, by torch's profiler: self CPU time of each operation, summed
over kinds. Matrix products are what a FLOP bound counts; the rest is what keeps a step from it.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table
from speed_methods import build, quiet
from speed_plans import matmul_rate
from speed_workloads import Case, random_workload
from torch.profiler import ProfilerActivity, profile
from train_speed import machine

from prefillshare_train.evaluation.records import write_json

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn"),
    "copies and casts": ("copy_", "to_copy", "cat", "clone", "index", "fill_", "zero_"),
    "softmax and loss": ("softmax", "log_softmax", "logsumexp", "max", "exp_", "gather", "masked"),
    "allocation": ("empty", "resize", "new_", "zeros"),
}


def kind_of(name: str) -> str:
    """Which of `KINDS` an operation belongs to; `elementwise and norms` for the others."""
    plain = name.removeprefix("aten::").lstrip("_")  # the work of softmax is in _softmax
    for kind, parts in KINDS.items():
        if any(plain == part or plain.startswith(part) for part in parts):
            return kind
    return "elementwise and norms"


def shares(method: str, case: Case, rows: int, repeats: int) -> dict[str, float]:
    """Seconds of each kind in one micro-batch, mean of `repeats` after a warm-up."""
    workload = random_workload(512, 64, rows, case.config().vocab_size)
    _, run = build(method, case, workload)
    run(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            run(0)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / repeats
        else:  # autograd nodes and Python
            seconds["autograd"] += event.self_cpu_time_total / 1e6 / repeats
    return dict(seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_step.json"))
    options = parser.parse_args()
    quiet()
    console = Console(width=130)
    table = Table(title=f"seconds a micro-batch of {options.micro_batch}, share of the whole")
    found = []
    for dtype in ("float32", "bfloat16"):
        for adapter in ("none", "lora"):
            case = Case(options.model, adapter, False, dtype)
            rate = matmul_rate(case.config(), case.torch_dtype, 2048)
            for method in ("sft", "prefillshare"):
                seconds = shares(method, case, options.micro_batch, options.repeats)
                key = {"dtype": dtype, "adapter": adapter, "method": method}
                found.append({**key, "matmul_gflops": rate / 1e9, "seconds": seconds})
    kinds = sorted({kind for row in found for kind in row["seconds"]})
    for column in ("dtype", "adapter", "method", "whole", *kinds):
        table.add_column(column, justify="right")
    for row in found:
        whole = sum(row["seconds"].values())
        cells = [f"{row['seconds'].get(kind, 0) / whole:.0%}" for kind in kinds]
        table.add_row(row["dtype"], row["adapter"], row["method"], f"{whole:.2f}", *cells)
    console.print(table)
    write_json(options.out, {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()
