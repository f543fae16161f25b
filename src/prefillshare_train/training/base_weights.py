"""Where the frozen base's weights live: whole on every rank, or a share on each."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from prefillshare_train.core.forward import attach_loss_head, causal_lm_of
from prefillshare_train.training.launch import LaunchError, shards_parameters

_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextlib.contextmanager
def whole_weights(arguments: Any) -> Iterator[None]:
    """Load models whole on every rank inside the block.

    Under ZeRO-3 transformers partitions what it loads, and under FSDP's efficient loading every
    rank but the first gets empty weights. Neither could be fingerprinted, nor prefill by itself.

    Args:
        arguments: the trainer's, made before any model is loaded.
    """
    from transformers.integrations import deepspeed

    efficient = os.environ.pop(_EFFICIENT_LOADING, None)
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if efficient is not None:
            os.environ[_EFFICIENT_LOADING] = efficient
        if plugin is not None:
            plugin.set_deepspeed_weakref()


def shard_base(base: nn.Module, accelerator: Any) -> nn.Module:
    """Give every rank a share of the base's parameters; they are gathered a layer at a time.

    Args:
        base: loaded whole, frozen.

    Returns:
        The wrapper to call in its place.

    Raises:
        LaunchError: neither FSDP2 nor ZeRO-3 runs.
    """
    if not shards_parameters(accelerator):
        raise LaunchError(
            "training.shard_base needs FSDP2 or ZeRO-3, and accelerate made "
            f"{accelerator.distributed_type.value}. Set it to false, or launch with "
            "recipes/accelerate/fsdp2.yaml or zero3.yaml"
        )
    attach_loss_head(base)
    if accelerator.distributed_type == DistributedType.FSDP:
        return _fully_shard(base, accelerator)
    return _zero3_inference(base, accelerator)


def _fully_shard(base: nn.Module, accelerator: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # Without mixed precision: the K/V that decoders read have the dtype of the weights as loaded.
    plugin = accelerator.state.fsdp_plugin
    options: dict[str, Any] = {"reshard_after_forward": True}
    if plugin.cpu_offload is not None:
        options["offload_policy"] = plugin.cpu_offload
    layers: Any = causal_lm_of(base).base_model.layers
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(base, **options)  # in place
    return base


def _zero3_inference(base: nn.Module, accelerator: Any) -> nn.Module:
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    # An engine without an optimizer gathers and releases, and does nothing else.
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        config.pop(key, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        if zero.get(key) == "auto":
            zero.pop(key)
    engine, *_ = deepspeed.initialize(model=base, config=config)
    engine.eval()
    return engine
