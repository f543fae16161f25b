"""Where models run unless told otherwise, and in which dtype."""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    """Where models answer unless told otherwise: the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where a device multiplies matrices in it, float32 elsewhere.

    Args:
        device: `default_device()` where None.
    """
    fast = has_fast_products(torch.bfloat16, device or default_device())
    return torch.bfloat16 if fast else torch.float32


def default_dtype_name(device: torch.device | str | None = None) -> str:
    """`default_dtype` as recipes, contracts and options write it, such as `bfloat16`."""
    return str(default_dtype(device)).removeprefix("torch.")


def has_fast_products(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether matrix products of a dtype are not much slower there than in float32.

    CPUs without AVX-512 (or, on ARM, without BF16), most laptops among them, have no product in
    half precision that torch could use; its loops for them are many times slower.
    """
    if dtype not in _HALF:
        return True
    kind = torch.device(device).type
    if kind == "cpu":
        return _cpu_has(dtype)
    if kind == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    # What torch itself asks before it hands a product to oneDNN; there is no public name for it.
    # A torch without oneDNN (macOS) does not register the operators.
    if not torch.backends.mkldnn.is_available():
        return False
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(ask and ask())


def warn_of_slow_products(dtype: torch.dtype, device: torch.device | str) -> None:
    """Say once what a half precision costs on a device that does not multiply in it."""
    kind = torch.device(device).type
    if not has_fast_products(dtype, device):
        _warn_once(str(dtype).removeprefix("torch."), kind)


@functools.cache
def _warn_once(dtype: str, kind: str) -> None:
    logger.warning(
        "this %s has no matrix products in %s, which is many times slower here than float32: set "
        "base.dtype to auto or float32 and training.bf16 to auto or false in a recipe, or give "
        "--dtype float32",
        "CPU" if kind == "cpu" else "GPU",
        dtype,
    )
