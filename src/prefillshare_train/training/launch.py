"""What the launcher was asked for, and what accelerate made of it.

accelerate falls back in silence: to one process where several were asked for, to DDP where FSDP or
DeepSpeed were, to ranks that each train on all the data. Every such run looks healthy, so each is
refused here, with what to write instead.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env

from prefillshare_train.core.contract import Contract
from prefillshare_train.training.recipe import RecipeError

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_CONFIGS = "`accelerate launch --config_file recipes/accelerate/…` with one of the files there"


class LaunchError(RecipeError):
    """The processes are not what was asked for; the message says how to launch them."""


def world_size_asked() -> int:
    """Processes that the launcher started, by the environment that it left."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_lone_process() -> None:
    """Find out a process that a launcher meant to be one of several, before anything is loaded.

    `accelerate launch --cpu --num_processes 2` names a meeting point for two processes and starts
    one, which knows no rank.

    Raises:
        LaunchError: this is such a process.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and not any(name in os.environ for name in _RANK_VARIABLES):
        raise LaunchError(
            "accelerate was asked for several processes and started one, which would train alone. "
            f"Use {_CONFIGS} (cpu/ddp.yaml for CPUs). If one process is meant, pass "
            "--num_processes 1 and unset MASTER_ADDR"
        )


def allow_sharding_on_cpu() -> None:
    """Have accelerate shard where FSDP was asked for on CPU ranks.

    accelerate 1.15 knows FSDP for accelerators only and gives CPU ranks DDP without a word, while
    torch's `fully_shard` runs on gloo. To be called once the process group is there and before
    the Accelerator is made.
    """
    state = PartialState._shared_state
    if (
        parse_flag_from_env("ACCELERATE_USE_FSDP")
        and state.get("distributed_type") == DistributedType.MULTI_CPU
    ):
        state["distributed_type"] = DistributedType.MULTI_GPU


def check_launch(accelerator: Any) -> None:
    """Compare the processes and the engine with what the launcher was asked for.

    Raises:
        LaunchError: they differ.
    """
    wanted, found = world_size_asked(), accelerator.num_processes
    if wanted != found:
        raise LaunchError(
            f"the launcher started {wanted} processes, but this one takes part in a group of "
            f"{found}: each would train alone on all the data. Use {_CONFIGS}; on CPUs without "
            "them set training.ddp_backend=gloo"
        )
    made = accelerator.distributed_type
    for variable, engine in (
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
    ):
        if parse_flag_from_env(variable) and made != engine:
            raise LaunchError(
                f"{engine.value} was asked for and accelerate made {made.value}. "
                + (
                    "Set training.use_cpu=false: with it DeepSpeed is left out. "
                    if engine == DistributedType.DEEPSPEED
                    else "FSDP needs two processes or more. "
                )
                + f"Use {_CONFIGS}"
            )
    if made == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise LaunchError(
            "FSDP 1 flattens parameters, which neither adapters nor a shared base survive. Set "
            "fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does"
        )


def check_agreement(contract: Contract) -> None:
    """Compare what the ranks train over; all must call this together.

    Nodes may hold other files under one name, and `base.dtype: auto` may come out otherwise there.

    Raises:
        LaunchError: they differ.
    """
    held: list[dict[str, Any]] = gather_object([dataclasses.asdict(contract)])
    for rank, other in enumerate(held):
        for key, first in held[0].items():
            if other[key] != first:
                raise LaunchError(
                    f"ranks would train over different caches: {key} is {first!r} on rank 0 and "
                    f"{other[key]!r} on rank {rank}. Give every node the same base and data, and "
                    "set base.dtype where their processors differ"
                )


def follow_clipping(accelerator: Any, max_grad_norm: float) -> None:
    """Have DeepSpeed clip as `training.max_grad_norm` says.

    accelerate 1.15 takes 0.0 (no clipping) for "not given" and clips at 1.0, which Adam hides.
    """
    if _is_deepspeed(accelerator):
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def keep_loss_precision(accelerator: Any) -> None:
    """Have FSDP2 leave what modules return as it is.

    accelerate 1.15 has it cast outputs to half precision, and with them the loss over a whole
    micro-batch, to three digits.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None
        )


def shards_parameters(accelerator: Any) -> bool:
    """Whether a rank holds a share of each trained module's parameters only (FSDP2, ZeRO-3)."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    plugin = accelerator.state.deepspeed_plugin if _is_deepspeed(accelerator) else None
    return plugin is not None and plugin.zero_stage == 3


def _is_deepspeed(accelerator: Any) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; all ranks must ask together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    value = torch.tensor(int(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())
