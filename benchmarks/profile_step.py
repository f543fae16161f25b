"""Where a training step's time goes, by kind of operation.

    OMP_NUM_THREADS=2 python benchmarks/profile_step.py --model .cache/models/smollm2-135m-instruct
                                                        [--resume]

One micro-batch (prefill, forward, backward) of our trainer and of the hand-written loop, by torch's
profiler: self CPU time of each operation, summed over kinds. Matrix products and attention are what
a FLOP bound counts; the rest is what keeps a step from it. Micro-batches are those of
`benchmarks/train_speed.py`: 512/64 and 1024/64 and with activation checkpointing 256/64 too, one
Seal-Tools request of middle length, and 1024/64 of the small random model. `--resume` keeps what
the results hold of this machine, so that a run that was cut off goes on; the code must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table
from speed_methods import build, quiet
from speed_plans import make_plan, matmul_rate
from speed_workloads import RANDOM_MODEL, Case, Workload, random_workload, seal_tools_workload
from torch.profiler import ProfilerActivity, profile

from prefillshare_train.evaluation.records import write_json
from prefillshare_train.workloads.machine import machine

SHAPES = ((512, 64), (1024, 64))
CHECKPOINTED = ((1024, 64), (256, 64), (512, 64))
KEYS = ("model", "workload", "dtype", "adapter", "checkpointing", "method")
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


def held(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run on this machine."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    return before["rows"] if before.get("machine") == machine() else []


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
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out")
    options = parser.parse_args()
    quiet()
    console = Console(width=150)

    def random_rows(model: str, shape: tuple[int, int]) -> Workload:
        vocabulary = Case(model, "none", False, "float32").config().vocab_size
        return random_workload(*shape, options.micro_batch, vocabulary)

    settings = [
        (options.model, random_rows(options.model, shape), checkpointing)
        for checkpointing, shapes in ((False, SHAPES), (True, CHECKPOINTED))
        for shape in shapes
    ]
    if options.seal_tools.is_dir():
        seal_tools = seal_tools_workload(options.seal_tools, options.model, 1, 1)
        settings.append((options.model, seal_tools, False))
    else:
        console.print(f"Seal-Tools is not at {options.seal_tools}: its rows are left out")
    settings.append((RANDOM_MODEL, random_rows(RANDOM_MODEL, SHAPES[-1]), False))
    found = held(options.out) if options.resume else []
    for (model, workload, checkpointing), dtype, adapter in product(
        settings, ("float32", "bfloat16"), ("none", "lora")
    ):
        case = Case(model, adapter, checkpointing, dtype)
        rate = matmul_rate(case.config(), case.torch_dtype, 2048)
        flops = make_plan(case, workload, {}).flops
        for method in ("sft", "prefillshare"):
            names = (Path(model).name, workload.name, dtype, adapter, checkpointing, method)
            if names in {tuple(row[key] for key in KEYS) for row in found}:
                continue
            console.print(*names)
            found.append(
                {
                    **dict(zip(KEYS, names, strict=True)),
                    "conversations": len(workload.micro_batches[0]),
                    "matmul_gflops": rate / 1e9,
                    "flops": flops[method],
                    "seconds": seconds_by_kind(method, case, workload, options.repeats),
                }
            )
            write_json(options.out, {"machine": machine(), "rows": found})
    kinds = sorted({kind for row in found for kind in row["seconds"]})
    table = Table(title="seconds a micro-batch")
    for column in (*KEYS, "whole", *kinds):
        table.add_column(column, justify="right")
    for row in found:
        seconds = row["seconds"]
        cells = [f"{seconds.get(kind, 0):.2f}" for kind in kinds]
        names = [str(row[key]) for key in KEYS]
        table.add_row(*names, f"{sum(seconds.values()):.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
