"""`prefillshare train` under `accelerate launch`, watched: what the launch tests start.

It is `-m prefillshare_train.train` with two observers: one kills a rank at a step, and one writes
down, at the end, what accelerate made and what became of the base.

    accelerate launch --config_file recipes/accelerate/cpu/ddp.yaml tests/training/launched.py \
        RECIPE [key=value …] [--resume]

LAUNCHED_FACTS names the file for rank 0's facts, LAUNCHED_KILL=RANK:STEP the rank to kill.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import typer
from torch import nn
from torch.distributed.tensor import DTensor

from prefillshare_train.cli.train import train
from prefillshare_train.core.contract import weights_fingerprint
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.training import run
from prefillshare_train.training.trainer import CacheConditionedTrainer

gathers_per_prefill: list[int] = []
elements_per_prefill: list[int] = []


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, however it is shared out; every rank must ask."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def base_facts(trainer: CacheConditionedTrainer) -> dict[str, Any]:
    """What became of the base's parameters."""
    prefill = trainer.prefill
    assert isinstance(prefill, PrefillModule)
    model = prefill.causal_lm
    named = [(n, p) for n, p in model.named_parameters() if ".lora_" not in n]
    copied = nn.Module()
    for name, parameter in named:
        clean = name.replace(".base_layer.", ".")
        copied.register_parameter(
            clean.replace(".", "/"), nn.Parameter(whole(parameter), requires_grad=False)
        )
    names = [name for name, _ in copied.named_parameters()]
    restored = {name.replace("/", "."): p for name, p in copied.named_parameters()}
    assert len(names) == len(named)

    class Named(nn.Module):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return iter(restored.items())

    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        "base_fingerprint": weights_fingerprint(Named()),  # type: ignore[arg-type]
        "base_in_optimizer": sum(id(p) in held for _, p in named),
        "base_gradients": sum(p.grad is not None or p.requires_grad for _, p in named),
        "base_local": sum(_local(p) for _, p in named),
        "base_total": sum(p.numel() for p in restored.values()),
    }


def _local(parameter: torch.Tensor) -> int:
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return getattr(parameter, "ds_tensor", parameter).numel()


def watch() -> None:
    """Install the observers."""
    plain_publish, plain_step = run.publish_decoder, CacheConditionedTrainer.training_step
    kill = os.environ.get("LAUNCHED_KILL")
    facts = os.environ.get("LAUNCHED_FACTS")

    def publish(trainer: CacheConditionedTrainer, *args: Any) -> None:
        plain_publish(trainer, *args)
        found = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "processes": trainer.accelerator.num_processes,
            "engine": type(trainer.model_wrapped).__name__,
            "gathers_per_prefill": sorted(set(gathers_per_prefill)),
            "elements_per_prefill": sorted(set(elements_per_prefill)),
            **base_facts(trainer),
        }
        if facts and trainer.is_world_process_zero():
            Path(facts).write_text(json.dumps(found))

    def step(self: CacheConditionedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kill == f"{os.environ.get('RANK')}:{self.state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_step(self, *args, **kwargs)

    run.publish_decoder = publish
    CacheConditionedTrainer.training_step = step  # type: ignore[method-assign]
    _count_gathers()


def _count_gathers() -> None:
    """Count FSDP's all-gathers, and the elements that ZeRO-3 gathers, in each prefill."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    plain_gather, plain_run = group.foreach_all_gather, PrefillModule._run
    count, elements = [0], [0]

    def gather(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain_gather(*args, **kwargs)

    def counted(self: PrefillModule, *args: Any, **kwargs: Any) -> None:
        count[0] = elements[0] = 0
        plain_run(self, *args, **kwargs)
        gathers_per_prefill.append(count[0])
        elements_per_prefill.append(elements[0])

    group.foreach_all_gather = gather
    PrefillModule._run = counted  # type: ignore[method-assign]
    if importlib.util.find_spec("deepspeed") is None:
        return
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    plain_fetch = getattr(Coordinator, name)

    def fetch(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        elements[0] += sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE")
        return plain_fetch(self, params, *args, **kwargs)

    setattr(Coordinator, name, fetch)


if __name__ == "__main__":
    watch()
    typer.run(train)
