"""Which settings the training benchmark runs, what each costs, and what fits a quick run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from speed_workloads import (
    DEVICE,
    METHODS,
    RANDOM_MODEL,
    Case,
    Workload,
    random_workload,
    seal_tools_workload,
)
from transformers import AutoModelForCausalLM

from prefillshare_train.core.cost import matmul_parameters
from prefillshare_train.training.metrics import measured_tflops

SHAPES = ((64, 64), (256, 64), (512, 64), (1024, 64))
QUICK_SHAPE = (512, 64)
QUICK_SECONDS = 165.0  # leaves some of three minutes to a machine whose speed varies
# TRL and aLoRA are slow on a CPU, and their rounds differ by less than they are behind. A round of
# Seal-Tools is several micro-batches already.
ROUNDS = {"sft": 3, "prefillshare": 3, "trl": 1, "alora": 1}
SEAL_TOOLS_ROUNDS = {"sft": 2, "prefillshare": 2, "trl": 1, "alora": 1}
CONVERSATIONS = 4  # a micro-batch, unless told otherwise
# To estimate how long a pass takes: the share of the matmul rate that is reached, what TRL takes
# for its LM head on every position (a position and vocabulary entry), and what a model's making.
EFFICIENCY = {"float32": 0.7, "bfloat16": 0.4}
TRL_HEAD_SECONDS = 5e-8
SECONDS_TO_BUILD = 0.7


@dataclass(frozen=True)
class Plan:
    """A setting, its work and what that costs."""

    case: Case
    workload: Workload
    flops: dict[str, int]
    rounds: dict[str, int]

    def pass_seconds(self, method: str, rate: float) -> float:
        """Estimate of a method's pass, at a matmul rate in FLOP/s."""
        seconds = self.flops[method] / (rate * EFFICIENCY[self.case.dtype])
        if method in ("trl", "alora"):
            positions = sum(len(c.token_ids) for c in self.workload.conversations)
            seconds += positions * self.case.config().vocab_size * TRL_HEAD_SECONDS
        return seconds

    @property
    def memory_share(self) -> float:
        """What the largest micro-batch, which memory is measured in, is of a pass."""
        tokens = [
            sum(len(c.token_ids) for c in w.conversations)
            for w in (self.workload.largest, self.workload)
        ]
        return tokens[0] / tokens[1]

    def seconds(self, rate: float) -> float:
        """Estimate of everything: passes for memory and step 0, and the timed ones."""
        passes = {m: self.rounds[m] + 1 + self.memory_share for m in self.case.methods}
        return sum(
            self.pass_seconds(m, rate) * passes[m] + 2 * SECONDS_TO_BUILD for m in self.case.methods
        )


def make_plan(case: Case, workload: Workload, rounds: dict[str, int]) -> Plan:
    """Count a setting's FLOPs; no weights are made for it."""
    config = case.config()
    with torch.device("meta"):
        weights = matmul_parameters(AutoModelForCausalLM.from_config(config))
    flops = {m: workload.flops(m, config, weights, case) for m in case.methods}
    return Plan(case, workload, flops, rounds)


def matmul_rate(config: Any, dtype: torch.dtype, rows: int) -> float:
    """FLOP/s of a plain product of the model's MLP shape, the median of a few."""
    return 1e12 * measured_tflops(config, DEVICE, dtype, rows)


def wait_for_device() -> None:
    """Return once a GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def rates_of(dtypes: list[str], model: str) -> dict[str, float]:
    """Matmul rate of each dtype, FLOP/s."""
    config = Case(model, "none", False, "float32").config()
    return {dtype: matmul_rate(config, getattr(torch, dtype), 2048) for dtype in dtypes}


def quick_plans(
    options: argparse.Namespace, rates: dict[str, float], seconds: float, console: Console
) -> list[Plan]:
    """The 512/64 rows of each dtype with the largest micro-batches that fit the time.

    Every dtype gets a micro-batch of one conversation before any gets a larger one.

    Args:
        options: of the command line.
        rates: from `rates_of`.
        seconds: for all rows together.
        console: told which dtype is left out.
    """
    rounds = ROUNDS if options.rounds is None else dict.fromkeys(METHODS, options.rounds)
    vocabulary = Case(options.model, "none", False, "float32").config().vocab_size
    chosen: dict[str, list[Plan]] = {dtype: [] for dtype in options.dtype}

    def cost(plans: list[Plan]) -> float:
        return sum(plan.seconds(rates[plan.case.dtype]) for plan in plans)

    sizes = [options.micro_batch] if options.micro_batch else [1, 2, 4]
    for rows in sizes:
        workload = random_workload(*QUICK_SHAPE, rows, vocabulary)
        for dtype in options.dtype:
            cases = [Case(options.model, adapter, False, dtype) for adapter in ("none", "lora")]
            plans = [make_plan(case, workload, rounds) for case in cases]
            others = sum(cost(chosen[d]) for d in options.dtype if d != dtype)
            if others + cost(plans) <= seconds:
                chosen[dtype] = plans
            elif rows == sizes[0]:
                console.print(
                    f"{dtype} with micro-batches of {rows}: left out; its rows would take about "
                    f"{cost(plans):.0f} s, and {seconds - others:.0f} s are left for them"
                )
    return [plan for plans in chosen.values() for plan in plans]


def in_time(queue: Sequence[Plan], rates: dict[str, float], pace: float, seconds: float) -> Plan:
    """The first of the plans, with fewer rounds where that takes to end all of them in time.

    Args:
        queue: what is left to do.
        rates: from `rates_of`.
        pace: measured seconds of what is done, over those that it was estimated to take.
        seconds: left.
    """
    for most in range(max(queue[0].rounds.values()), 0, -1):
        fewer = [replace(p, rounds={m: min(n, most) for m, n in p.rounds.items()}) for p in queue]
        if pace * sum(plan.seconds(rates[plan.case.dtype]) for plan in fewer) <= seconds:
            break
    return fewer[0]


def all_plans(options: argparse.Namespace, console: Console) -> list[Plan]:
    """Every setting: shapes, models, adapters, checkpointing, dtypes.

    Those that the targets are about come first, so that a run that is cut off has them.
    """
    rows = options.micro_batch or CONVERSATIONS
    switches = [s for s in (False, True) if options.checkpointing in (None, ("off", "on")[s])]
    plans = []

    def add(model: str, workloads: Sequence[Workload], usual: dict[str, int]) -> None:
        rounds = usual if options.rounds is None else dict.fromkeys(METHODS, options.rounds)
        for settings in itertools.product(switches, options.dtype, ("lora", "none"), workloads):
            checkpointing, dtype, adapter, workload = settings
            plans.append(make_plan(Case(model, adapter, checkpointing, dtype), workload, rounds))

    for model in (options.model,) if options.no_random else (options.model, RANDOM_MODEL):
        vocabulary = Case(model, "none", False, "float32").config().vocab_size
        shapes = [random_workload(*shape, rows, vocabulary) for shape in options.shapes]
        add(model, shapes, ROUNDS)
    if options.seal_tools.is_dir():
        real = seal_tools_workload(options.seal_tools, options.model, max(1, rows // 4))
        add(options.model, [real], SEAL_TOOLS_ROUNDS)
    else:
        console.print(f"Seal-Tools is not at {options.seal_tools}: its rows are left out")
    return sorted(plans, key=lambda plan: _lateness(plan.case))


def _lateness(case: Case) -> tuple[bool, bool, bool]:
    slow = case.checkpointing and case.dtype == "float32"
    return slow, case.checkpointing, case.model == RANDOM_MODEL
