"""Keeps vLLM's LoRA for CPU off the base's tokens.

Its kernels look an adapter up by a slot's index, and -1 stands for none: it picks the last slot.
In a batch with an adapter's tokens the base's then get that adapter, and their K/V are wrong,
without an error. (The kernels for GPUs leave such tokens out.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# Where each method looks up its rows' slots.
_INDICES = {
    "add_lora_linear": "token_lora_indices",
    "add_lora_embedding": "token_lora_indices",
    "add_lora_logits": "sampler_indices",
    "apply_lora_full_linear": "sampler_indices",
}


def protect_on_cpu() -> None:
    """`protect` vLLM's own class, in a process that runs a model on the CPU."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        protect(PunicaWrapperCPU)


def protect(wrapper: Any) -> None:
    """Let a class's methods change the rows of adapters only; again does nothing.

    Args:
        wrapper: vLLM's `PunicaWrapperCPU`.
    """
    for name, indices in _INDICES.items():
        method = getattr(wrapper, name)
        if getattr(method, "__wrapped__", None) is None:
            setattr(wrapper, name, _adapters_only(method, indices))


def _adapters_only(method: Callable[..., Any], indices: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def changed(self: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        rows = y.view(-1, y.shape[-1])
        base = getattr(self, indices)[: len(rows)] < 0
        if not base.any():
            return method(self, y, *args, **kwargs)
        if base.all() and len(base) == len(rows):
            return None
        kept = rows[: len(base)][base]
        result = method(self, y, *args, **kwargs)
        rows[: len(base)][base] = kept
        return result

    return changed
