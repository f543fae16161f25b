"""Where a training step's time goes, by kind of operation.

    OMP_NUM_THREADS=2 python benchmarks/profile_step.py --model .cache/models/smollm2-135m-instruct

One micro-batch (prefill, forward, backward) of our trainer and of the hand-written loop, by torch's
profiler: self CPU time of each operation, summed over kinds. Matrix products and attention are what
a FLOP bound counts; the rest is what keeps a step from it. Micro-batches are those of
`benchmarks/train_speed.py`: 512/64 and 1024/64, and one Seal-Tools request of middle length.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table
from speed_methods import build, quiet
from speed_plans import make_plan, matmul_rate
from speed_workloads import Case, Workload, random_workload, seal_tools_workload
from torch.profiler import ProfilerActivity, profile
from train_speed import machine

from prefillshare_train.evaluation.records import write_json

SHAPES = ((512, 64), (1024, 64))
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "gradients added": ("add_",),
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


def seconds_by_kind(method: str, case: Case, workload: Workload, repeats: int) -> dict[str, float]:
    """Seconds of each kind in one micro-batch, mean of `repeats` after a warm-up."""
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
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seal-tools", type=Path, default=Path("../shared/data/seal_tools"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_step.json"))
    options = parser.parse_args()
    quiet()
    console = Console(width=150)
    vocabulary = Case(options.model, "none", False, "float32").config().vocab_size
    workloads = [random_workload(*shape, options.micro_batch, vocabulary) for shape in SHAPES]
    if options.seal_tools.is_dir():
        workloads.append(seal_tools_workload(options.seal_tools, options.model, 1, 1))
    else:
        console.print(f"Seal-Tools is not at {options.seal_tools}: its rows are left out")
    found = []
    for workload, dtype, adapter in product(workloads, ("float32", "bfloat16"), ("none", "lora")):
        case = Case(options.model, adapter, False, dtype)
        rate = matmul_rate(case.config(), case.torch_dtype, 2048)
        flops = make_plan(case, workload, {}).flops
        for method in ("sft", "prefillshare"):
            console.print(f"{workload.name} {dtype} {adapter} {method}")
            found.append(
                {
                    "workload": workload.name,
                    "conversations": len(workload.micro_batches[0]),
                    "dtype": dtype,
                    "adapter": adapter,
                    "method": method,
                    "matmul_gflops": rate / 1e9,
                    "flops": flops[method],
                    "seconds": seconds_by_kind(method, case, workload, options.repeats),
                }
            )
            write_json(options.out, {"machine": machine(), "rows": found})
    kinds = sorted({kind for row in found for kind in row["seconds"]})
    table = Table(title="seconds a micro-batch")
    for column in ("workload", "dtype", "adapter", "method", "whole", *kinds):
        table.add_column(column, justify="right")
    for row in found:
        seconds = row["seconds"]
        cells = [f"{seconds.get(kind, 0):.2f}" for kind in kinds]
        names = [row[key] for key in ("workload", "dtype", "adapter", "method")]
        table.add_row(*names, f"{sum(seconds.values()):.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
