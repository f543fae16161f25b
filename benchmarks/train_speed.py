"""Training speed and memory, side by side: hand-written SFT, TRL, PEFT aLoRA, and prefillshare.

    python benchmarks/train_speed.py --model .cache/models/smollm2-135m-instruct [--quick]
                                     [--minutes 20]

All methods of a setting run in one process on the same token ids, interleaved round by round;
medians are reported, of the ratios of each round too. A round is forward and backward of every
micro-batch by each method, added onto gradients that exist, then one AdamW step (fused), timed
once, since it is the same for all: the same number of parameters, and the states of one model. A
training step is then `--accumulation` micro-batches and one optimizer step. Before any timing,
every method's loss at step 0 must be the same. Peak memory is the resident high-water mark of the
largest micro-batch and an optimizer step in a process of its own a method; on a GPU, which is used
where there is one, the allocator's peak.

Methods: `sft` is a hand-written loop (SDPA, LM head on target positions); `trl` TRL's SFTTrainer,
completion-only; `alora` the same with a PEFT aLoRA adapter that starts at the assistant header;
`prefillshare` our trainer's own step. The quick run is 512/64 on the given model, checkpointing
off, in under three minutes: it takes the largest micro-batches that fit, down to one conversation,
one round of TRL and aLoRA (they are slow on a CPU, where TRL runs the LM head everywhere), and
fewer rounds of the others where the first settings took longer than estimated.

The whole run takes hours on two cores. It keeps every finished setting under `--runs`: a run that
was killed, or stopped by `--minutes`, goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import speed_memory
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from speed_kept import KeptRows
from speed_methods import adamw, build, quiet
from speed_plans import (
    QUICK_SECONDS,
    SECONDS_TO_BUILD,
    SHAPES,
    Plan,
    all_plans,
    in_time,
    matmul_rate,
    quick_plans,
    rates_of,
    wait_for_device,
)
from speed_report import Row, print_table, write_json, write_plot

from prefillshare_train.workloads.machine import machine

RESULTS = Path("benchmarks/results/train_speed.json")
QUICK_RESULTS = Path("runs/train_speed/quick.json")  # docs/speed.md is of the whole grid
QUICK_END = 175.0  # seconds after which a quick run ends no setting
# How far losses at step 0 may lie apart, in nats a target token. What rounding logits to bfloat16
# does to a loss does not vanish with it: a share of the loss alone would not do.
TOLERANCES: dict[str, Callable[[float], float]] = {
    "float32": lambda loss: 1e-5 * loss,
    "bfloat16": lambda loss: max(0.01, 5e-3 * loss),
}


class Bar:
    """Progress in estimated seconds."""

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task("start", total=total)

    def done(self, seconds: float, doing: str) -> None:
        """Some of the work is done."""
        self._progress.update(self._task, advance=seconds, description=doing)


def measure(plan: Plan, options: argparse.Namespace, rate: float, bar: Bar) -> list[Row]:
    """All rows of a setting."""
    case, workload = plan.case, plan.workload
    label = f"{case.dtype} {case.adapter} {workload.name}"
    cost = {m: plan.pass_seconds(m, rate) for m in case.methods}
    memory = {}
    for method in case.methods:
        memory[method] = speed_memory.measure(method, case, workload, torch.get_num_threads())
        bar.done(cost[method] * plan.memory_share + SECONDS_TO_BUILD, f"{label} memory")

    models, runs = {}, {}
    for method in case.methods:
        models[method], runs[method] = build(method, case, workload)
    count = len(workload.micro_batches)
    losses = {}
    for method, run in runs.items():  # compiles kernels for these shapes, and makes the gradients
        losses[method] = sum(run(index) for index in range(count))
        bar.done(cost[method] + SECONDS_TO_BUILD, f"{label} step 0")
    check_losses(losses, case.dtype, label)

    optimizer = adamw(models["sft"])
    optimizer.step()
    config = case.config()
    longest = max(sum(len(c.token_ids) for c in rows) for rows in workload.micro_batches)
    times: dict[str, list[float]] = {m: [] for m in case.methods}
    optimizer_times, rates = [], []
    for number in range(max(plan.rounds.values())):
        for method, run in runs.items():
            if number >= plan.rounds[method]:
                continue
            start = time.perf_counter()
            for index in range(count):
                run(index)
            times[method].append(time.perf_counter() - start)
            bar.done(cost[method], f"{label} round {number + 1}")
        start = time.perf_counter()
        optimizer.step()
        wait_for_device()
        optimizer_times.append(time.perf_counter() - start)
        rates.append(matmul_rate(config, case.torch_dtype, longest))
    passes = options.accumulation / count
    optimizer_seconds = statistics.median(optimizer_times)
    seconds = {m: statistics.median(times[m]) for m in case.methods}
    step = {m: seconds[m] * passes + optimizer_seconds for m in case.methods}
    ratio = {m: step_ratio(times["sft"], times[m], passes, optimizer_seconds) for m in case.methods}
    prompt, response = workload.mean_lengths
    return [
        {
            "method": method,
            "adapter": case.adapter,
            "checkpointing": case.checkpointing,
            "model": Path(case.model).name,
            "prompt_tokens": prompt,
            "response_tokens": response,
            "response_tokens_per_s": workload.response_tokens * passes / step[method],
            "peak_memory_mib": memory[method].peak,
            "step0_loss": losses[method],
            "ratio_to_sft": ratio[method],
            "flop_bound": plan.flops["sft"] / plan.flops[method],
            "dtype": case.dtype,
            "workload": workload.name,
            "step_seconds": step[method],
            "pass_seconds": seconds[method],
            "optimizer_seconds": optimizer_seconds,
            "micro_batches_per_step": options.accumulation,
            "conversations_per_micro_batch": len(workload.micro_batches[0]),
            "rounds": plan.rounds[method],
            "peak_memory_to_sft": memory[method].peak / memory["sft"].peak,
            "peak_memory_over_libraries_mib": memory[method].peak - memory[method].libraries,
            "peak_memory_over_loaded_mib": memory[method].peak - memory[method].loaded,
            "gflops": plan.flops[method] / seconds[method] / 1e9,
            "matmul_gflops": statistics.median(rates) / 1e9,
            "matmul_share": plan.flops[method] / seconds[method] / statistics.median(rates),
            "machine": machine(),
        }
        for method in case.methods
    ]


def step_ratio(
    others: Sequence[float], own: Sequence[float], passes: float, optimizer_seconds: float
) -> float:
    """How many times as fast a method's step is: the median over rounds.

    A round is compared with itself, since a machine's speed may drift from one to the next.

    Args:
        others: seconds of the other method's passes, by round.
        own: of the method's, of the first of these rounds.
        passes: in a step.
        optimizer_seconds: of a step.
    """
    return statistics.median(
        (other * passes + optimizer_seconds) / (mine * passes + optimizer_seconds)
        for other, mine in zip(others, own, strict=False)
    )


def check_losses(losses: dict[str, float], dtype: str, label: str) -> None:
    """Refuse to compare methods that do not compute the same loss.

    Raises:
        SystemExit: a loss is further from the hand-written loop's than rounding takes it.
    """
    tolerance = TOLERANCES[dtype](losses["sft"])
    for method, loss in losses.items():
        if not abs(loss - losses["sft"]) <= tolerance:
            raise SystemExit(
                f"{label}: the loss of {method} at step 0 is {loss}, that of sft {losses['sft']}; "
                "they train different things, so no times are compared"
            )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--quick", action="store_true", help="512/64 only, within three minutes")
    parser.add_argument(
        "--dtype", type=lambda text: text.split(","), default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: [tuple(map(int, shape.split("/"))) for shape in text.split(",")],
        default=SHAPES,
        help="prompt and response tokens, such as 512/64,1024/64; all four unless given",
    )
    parser.add_argument("--checkpointing", choices=("off", "on"), help="both unless given")
    parser.add_argument("--no-random", action="store_true", help="leave the random model out")
    parser.add_argument("--micro-batch", type=int, help="conversations; 4 unless given")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches in a step")
    parser.add_argument("--rounds", type=int, help="timed rounds; 3, of TRL and aLoRA 1")
    parser.add_argument("--minutes", type=float, help="start no setting that ends later than this")
    parser.add_argument("--out", type=Path, help=f"{RESULTS}; {QUICK_RESULTS} with --quick")
    parser.add_argument("--runs", type=Path, default=Path("runs/train_speed"))
    parser.add_argument("--seal-tools", type=Path, default=Path("../shared/data/seal_tools"))
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there; `make model` fetches one")
    if unknown := set(options.dtype) - set(TOLERANCES):
        parser.error(f"--dtype {sorted(unknown)}: known are {', '.join(TOLERANCES)}")
    options.out = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    for name in ("micro_batch", "accumulation", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more; found {value}")
    return options


def main() -> None:
    """Run the settings, write the results after each, and print the table."""
    # Three minutes are those of the user: importing the libraries counts.
    started = time.perf_counter() - (time.time() - psutil.Process().create_time())
    options = parse()
    quiet()
    speed_memory.start_server()
    console = Console(width=150)
    console.print(f"{machine()}; a step is {options.accumulation} micro-batches and one AdamW step")
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    speed_memory.wait_for_server()
    rates = rates_of(options.dtype, options.model)
    kept = None if options.quick else KeptRows(options.runs, machine(), options.accumulation)
    if options.quick:
        limit = QUICK_END
        left = QUICK_SECONDS - (time.perf_counter() - started)
        queue = quick_plans(options, rates, left, console)
    else:
        limit = math.inf if options.minutes is None else 60 * options.minutes
        queue = all_plans(options, console)
    if not queue:
        raise SystemExit("nothing fits the three minutes of --quick here; run without it")
    left_out = []
    estimated, spent = 0.0, 0.0
    with Progress(*columns, console=console) as progress:
        bar = Bar(progress, sum(plan.seconds(rates[plan.case.dtype]) for plan in queue))
        for number, planned in enumerate(queue):
            rate = rates[planned.case.dtype]
            if kept and (known := kept.read(planned)):
                bar.done(planned.seconds(rate), "kept")
                rows += known
                continue
            plan, begin = planned, time.perf_counter()
            pace = max(1.0, spent / estimated) if estimated else 1.0
            if options.quick:
                plan = in_time(queue[number:], rates, pace, QUICK_SECONDS - (begin - started))
                bar.done(planned.seconds(rate) - plan.seconds(rate), "fewer rounds")
            if begin - started + pace * plan.seconds(rate) > limit:
                left_out.append(f"{plan.case.dtype} {plan.case.adapter} {plan.workload.name}")
                bar.done(plan.seconds(rate), "left out")
                continue
            measured = measure(plan, options, rate, bar)
            estimated += plan.seconds(rate)
            spent += time.perf_counter() - begin
            if kept:
                kept.keep(plan, measured)
            rows += measured
            write_json(rows, options.out)
            gc.collect()
    if left_out:
        console.print(f"{len(left_out)} settings would end after {limit:.0f} s and are left out:")
        console.print(", ".join(left_out))
    print_table(rows, console)
    plot = options.out.with_suffix(".png")
    write_plot(rows, plot)
    console.print(f"{options.out} and {plot}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
