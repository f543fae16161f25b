"""A PEFT model as its base: adapters and dropout off for a prefill, cheaply.

PEFT's `disable_adapter()` also freezes every adapter weight and thaws it again. On a GPU, which
runs a short prefill faster than Python visits the layers, that is most of the time, and under
`no_grad` it changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# Layers that only read their flag; some other tuners fold weights in when they are switched.
_FLAGGED = (LoraLayer, AuxiliaryTrainingWrapper, TrainableTokensLayer)


@contextlib.contextmanager
def adapters_off(model: PeftModel, *, through_forward: bool = False) -> Iterator[None]:
    """Adapters off and everything in eval mode; every flag as it was when the block ends.

    Args:
        through_forward: the pass calls the PEFT model itself and not the model in it, so that
            PEFT's own hooks must know too.

    Raises:
        RuntimeError: the adapters would run all the same.
    """
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    training = [m for m in modules if m.training]
    plain = layers and all(isinstance(layer, _FLAGGED) for layer in layers)
    if through_forward or not plain:
        with _peft_disabled(model, training):
            yield
        return
    off = [layer for layer in layers if not layer.disable_adapters]
    try:
        for module in training:
            module.training = False
        for layer in off:
            layer._disable_adapters = True
        if not all(layer.disable_adapters for layer in layers):
            raise RuntimeError(
                "PEFT's layers do not say that their adapters are off: this version keeps that "
                "elsewhere, and the adapter would fill the base's cache. Use an older peft, and "
                "please report its version"
            )
        yield
    finally:
        for layer in off:
            layer._disable_adapters = False
        for module in training:
            module.training = True


@contextlib.contextmanager
def _peft_disabled(model: PeftModel, training: list[nn.Module]) -> Iterator[None]:
    """The same by PEFT's own means, for any tuner."""
    # disable_adapter() freezes the adapters and thaws them by rules of its own; a user who froze
    # some of them must find them frozen.
    gradient_flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module in training:
            module.training = False
        with model.disable_adapter():
            # FSDP2 notes the trained parameters' dtype in its first pass, which is a prefill: with
            # all of them frozen it would leave their gradients in half precision.
            _restore(gradient_flags)
            yield
    finally:
        for module in training:
            module.training = True
        _restore(gradient_flags)


def _restore(gradient_flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in gradient_flags:
        parameter.requires_grad_(flag)
