"""Which adapter runs which row, when LoRA decoders of one base decode in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefillshare_train.core.decoder_set import twin_of
from prefillshare_train.core.few_rows import use_few_rows

BASE_ADAPTER = "__base__"
"""Name of no adapter at all, among those of a batch; PEFT's own word for it."""


class Adapters(Protocol):
    """Switches a model's adapters for the forward passes inside a block."""

    def running(self, names: Sequence[str]) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Use `names[i]` for row i, or `names[0]` for all where there is one.

        Returns:
            Further arguments of the model's forward.
        """
        ...


class NoAdapters:
    """A model that is one decoder."""

    @contextlib.contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Nothing to switch."""
        yield {}


class PeftAdapters:
    """PEFT's own switching and mixed batches, for every adapter that PEFT can run so."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    @property
    def can_mix(self) -> bool:
        """Whether rows of different adapters may share a batch.

        Not where one is DoRA or another variant, nor where one trains whole modules: PEFT would
        look for that module in every adapter of the batch.
        """
        modules = list(self._model.modules())
        variants = any(m.lora_variant for m in modules if isinstance(m, LoraLayer))
        return not variants and not any(isinstance(m, AuxiliaryTrainingWrapper) for m in modules)

    @contextlib.contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One adapter for the whole model, or names for its mixed-batch forward."""
        if len(set(names)) > 1:
            yield {"adapter_names": list(names)}
        elif names[0] == BASE_ADAPTER:
            with self._model.disable_adapter():
                yield {}
        else:
            if self._model.active_adapter != names[0]:
                self._model.set_adapter(names[0])
            yield {}


class StackedAdapters:
    """All plain LoRA adapters side by side: two products a layer, whatever the batch mixes.

    PEFT's mixed forward runs each adapter's rows on their own, which costs as much as the base
    model where rows are few (benchmarks/adapters.py). Here a layer's A and B of all adapters are
    stacked along their ranks, and each row's other ranks are masked to zero in between.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: number for number, name in enumerate(names)}
        self._index[BASE_ADAPTER] = len(names)
        self._tokens: Tensor | None = None
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @contextlib.contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Each row's adapter, until the block ends; the first one's for all where there is one."""
        with self.running_tokens([[name] for name in names]):
            yield {}

    @contextlib.contextmanager
    def running_tokens(self, names: Sequence[Sequence[str]]) -> Iterator[None]:
        """Each token's adapter, until the block ends.

        Args:
            names: one a token of the (rows, tokens) that run; a dimension of one holds for all.
        """
        self._tokens = torch.tensor([[self._index[name] for name in row] for row in names])
        self._masks = {}
        try:
            yield
        finally:
            self._tokens = None

    def mask(self, owners: tuple[int, ...], like: Tensor) -> Tensor:
        """(rows, tokens, ranks) booleans: True where a rank belongs to another adapter.

        Args:
            owners: the adapter that each stacked rank belongs to.
        """
        if self._tokens is None:
            raise RuntimeError("a model with stacked adapters ran without its rows being named")
        if owners not in self._masks:
            others = self._tokens[:, :, None] != torch.tensor(owners)
            self._masks[owners] = others.to(like.device)
        return self._masks[owners]


class _StackedLinear(nn.Module):
    """A linear layer with the low-rank updates of all adapters."""

    def __init__(
        self,
        linear: nn.Linear,
        a: Tensor,
        b: Tensor,
        owners: tuple[int, ...],
        rows: StackedAdapters,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.a, self.b = a, b
        self._owners = owners
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, in) -> (rows, tokens, out)."""
        low = F.linear(x, self.a)
        # Not a product with zeros: another adapter's overflow times 0 would be no number.
        low = low.masked_fill(self._rows.mask(self._owners, low), 0)
        output: Tensor = self.linear(x)
        return output + F.linear(low, self.b)


def stack_adapters(
    base: PreTrainedModel, peft_model: PeftModel, names: Sequence[str]
) -> tuple[PreTrainedModel, StackedAdapters] | None:
    """A model over the base's weights that runs all adapters stacked.

    Returns:
        The model and its switch; None where an adapter is more than plain LoRA on linear layers
        (DoRA, biases, trained embeddings or heads) or has weights that are no numbers, for which
        `PeftAdapters` is there.
    """
    rows = StackedAdapters(names)
    model = twin_of(base)
    layers = dict(peft_model.get_base_model().named_modules())
    for name, layer in layers.items():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            return None
        if not isinstance(layer, LoraLayer):
            continue
        stacked = _stack(layer, names, rows)
        if stacked is None:
            return None
        model.set_submodule(name, stacked)
    use_few_rows(model)
    return model, rows


def _stack(layer: Any, names: Sequence[str], rows: StackedAdapters) -> nn.Module | None:
    linear = layer.get_base_layer()
    plain = type(linear) is nn.Linear and not layer.lora_variant and not layer.lora_embedding_A
    if not plain or any(layer.lora_bias.values()) or layer.merged:
        return None
    held = [(number, name) for number, name in enumerate(names) if name in layer.lora_A]
    if not held:
        return linear
    # PEFT keeps adapters of a bfloat16 base in float32 for training; a decoding step that reads
    # them so would take half as many bytes again as the base's own weights.
    dtype = linear.weight.dtype
    a = [layer.lora_A[name].weight.detach().to(dtype) for _, name in held]
    b = [(layer.lora_B[name].weight.detach() * layer.scaling[name]).to(dtype) for _, name in held]
    if not all(bool(part.isfinite().all()) for part in (*a, *b)):
        return None  # no mask would keep it out of the other rows' sums
    owners = tuple(
        number for (number, _), part in zip(held, a, strict=True) for _ in range(len(part))
    )
    return _StackedLinear(linear, torch.cat(a), torch.cat(b, dim=1), owners, rows)
