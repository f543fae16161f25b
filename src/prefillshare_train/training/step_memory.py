"""Memory of one training step, found by running it on tensors that have shapes and no data.

Every operation of the real step is run under `FakeTensorMode`; what is alive is added up as tensors
come and go. So gradient checkpointing, autocast's copies of weights, chunked prefill and the
chunked loss are counted as they are, for a model of any size, in seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefillshare_train.core import kernels
from prefillshare_train.core.attention import JOB_KEYWORD, AttentionJob
from prefillshare_train.core.modules import PrefillModule, attach_loss_head

_LAYERS = (2, 4)  # simulated; a deeper model is the straight line through them


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beyond parameters, gradients and optimizer.

    Attributes:
        prompt_cache: K/V of the micro-batch's prompts.
        prefill: the base's activations at their highest, without the K/V.
        activations: the decoder's at their highest, from forward to backward, without gradients of
            parameters and without the prompt cache.
        with_gradients: the same with parameter gradients as they come up during the backward pass,
            which a step without accumulation has.
    """

    prompt_cache: int
    prefill: int
    activations: int
    with_gradients: int


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside, now and at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def known(self, tensors: Sequence[Tensor]) -> None:
        """Leave these out: they are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)


def simulate_step(
    make_models: Any,
    batch: dict[str, Any],
    *,
    layers: int,
    checkpointing: bool,
    autocast: torch.dtype | None,
    accelerator: bool,
) -> StepMemory:
    """Memory of one micro-batch of a model with many layers.

    Args:
        make_models: `make_models(layers)` gives decoder and base with that many layers; the base is
            None where the decoder carries it, and the string "none" for `full_prompt`.
        batch: from `collate`; token ids stay real, since they decide shapes.
        layers: of the model.
        checkpointing: activation checkpointing.
        autocast: dtype of mixed precision, or None.
        accelerator: attention keeps what fused kernels keep (queries, keys, values, output), and
            not the weights that the CPU kernel keeps.
    """

    def simulated(count: int) -> StepMemory:
        return _simulate(make_models, batch, count, checkpointing, autocast, accelerator)

    if layers <= _LAYERS[1]:
        return simulated(layers)
    low, high = map(simulated, _LAYERS)

    def extended(a: int, b: int) -> int:
        return round(b + (b - a) / (_LAYERS[1] - _LAYERS[0]) * (layers - _LAYERS[1]))

    return StepMemory(
        *(
            extended(getattr(low, name), getattr(high, name))
            for name in StepMemory.__dataclass_fields__
        )
    )


def _simulate(
    make_models: Any,
    batch: dict[str, Any],
    layers: int,
    checkpointing: bool,
    autocast: torch.dtype | None,
    accelerator: bool,
) -> StepMemory:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _attention_of(accelerator):
        with torch.device("meta"):
            decoder, base = make_models(layers)
        for model in (decoder, base):
            if isinstance(model, nn.Module):
                _give_fake_tensors(model)
        inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        cache, cache_bytes, prefill_peak = None, 0, 0
        decoder.train()
        if base != "none":
            prefill = PrefillModule(decoder if base is None else base)
            with _LiveBytes() as live:
                live.known([*decoder.parameters(), *prefill.causal_lm.parameters()])
                cache = prefill.prefill_packed(inputs)
                cache_bytes = cache.nbytes
            prefill_peak = max(0, live.peak - cache_bytes)
        attach_loss_head(decoder)
        if checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
            if hasattr(decoder, "enable_input_require_grads"):
                decoder.enable_input_require_grads()
        peaks = []
        for keep_gradients in (False, True):
            if not keep_gradients:
                hooks = [
                    p.register_post_accumulate_grad_hook(_forget)
                    for p in decoder.parameters()
                    if p.requires_grad
                ]
            with _LiveBytes() as live:
                live.known(list(decoder.parameters()))
                live.known([*cache.keys, *cache.values] if cache else [])
                _step(decoder, inputs, cache, autocast)
            peaks.append(live.peak)
            for hook in hooks:
                hook.remove()
    return StepMemory(cache_bytes, prefill_peak, peaks[0], peaks[1])


def _give_fake_tensors(model: nn.Module) -> None:
    """Put tensors of the fake CPU in place of a model's on the meta device, ties kept.

    (Adapters cannot be added to a model whose tensors are fake already.)
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _step(decoder: nn.Module, inputs: dict[str, Any], cache: Any, autocast: Any) -> None:
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context:
        sums = decoder(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            target_index=inputs["target_index"],
            **{JOB_KEYWORD: AttentionJob(inputs["layout"].decode_groups, past=cache)},
        )
    sums["nll"].backward()


@contextlib.contextmanager
def _attention_of(accelerator: bool) -> Iterator[None]:
    """Have attention keep for its backward what a fused kernel keeps."""
    if not accelerator:
        yield
        return
    plain = kernels._attend_blocks, kernels._attend_sdpa
    # The tensors are those of a CPU, where a pass takes the one or the other.
    kernels._attend_blocks = kernels._attend_sdpa = _fused_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels._attend_blocks, kernels._attend_sdpa = plain


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, *_: Any
) -> Tensor:
    if past is not None:
        key = torch.cat([past[0].to(key.dtype), key], dim=2)
        value = torch.cat([past[1].to(value.dtype), value], dim=2)
    # No fused kernel has grouped heads in float32.
    if value.dtype == torch.float32 and len(key) != len(query):
        key, value = (kernels.repeat_heads(t.transpose(0, 1), len(query)) for t in (key, value))
    output: Tensor = _FusedShape.apply(query, key, value)
    return output


class _FusedShape(torch.autograd.Function):
    """Shapes of a fused attention: it keeps its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return tuple(torch.empty_like(t) for t in (query, key, value))
