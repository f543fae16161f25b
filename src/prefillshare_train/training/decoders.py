"""Several decoders trained at once over one base that runs each distinct prompt once."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from prefillshare_train.core.contract import weights_fingerprint
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.training.launch import LaunchError, refuse_lone_process
from prefillshare_train.training.lockstep import Lockstep, TakeTurns, generator_states
from prefillshare_train.training.recipe import LoadedRecipe, RecipeError, decoder_recipes
from prefillshare_train.training.run import PreparedRun, RunResult, SharedBase, prepare_run


def train_decoders(loaded: LoadedRecipe, *, resume: bool = False) -> dict[str, RunResult]:
    """Train every decoder that a recipe's `decoders` names, in turns of one micro-batch.

    Each gives what a run of its own would give. Decoders that read the same rows in the same order
    read one prefill.

    Args:
        resume: each goes on from its newest complete checkpoint, if there is one.

    Returns:
        What each run left, by name.

    Raises:
        RecipeError: a decoder's recipe is wrong, or `method` leaves the base nothing to run.
        LaunchError: parameters are sharded, or DeepSpeed runs.
    """
    recipe = loaded.recipe
    refuse_lone_process()
    if recipe.method == "full_prompt":
        raise RecipeError(
            "decoders share the base's prefill, and method full_prompt has none. Train each by "
            "itself"
        )
    model = load_causal_lm(
        recipe.base_location,
        dtype=getattr(torch, recipe.base.dtype),
        revision=recipe.base.revision,
    )
    shared = SharedBase(SharedPrefill(model), weights_fingerprint(model))
    lockstep: Lockstep[RunResult] = Lockstep(on_round=shared.prefill.new_round)
    runs: dict[str, PreparedRun] = {}
    states: dict[str, tuple[Any, ...]] = {}
    for name, one in decoder_recipes(loaded).items():
        runs[name] = run = prepare_run(one, resume=resume, shared=shared)
        _check_engine(run)
        run.trainer.add_callback(TakeTurns(lockstep, name))
        states[name] = generator_states()
    nn.Module.to(model, next(iter(runs.values())).trainer.args.device)

    def stop(*_: Any) -> None:
        for run in runs.values():
            run.stop.stopped = True

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        results = lockstep.run({name: run.train for name, run in runs.items()}, states)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return {name: results[name] for name in runs}


def _check_engine(run: PreparedRun) -> None:
    made = run.trainer.accelerator.distributed_type
    if made in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise LaunchError(
            f"several decoders over one prefill train in one process or under DDP, not under "
            f"{made.value}. Launch with recipes/accelerate/ddp.yaml, or train each by itself"
        )
