"""Attention jobs that read and write blocks: packed prompt pieces, and decoding steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefillshare_train.core.attention import LastLayerReached
from prefillshare_train.core.kernels import attend_segments, masked_attention
from prefillshare_train.core.layout import SegmentGroup
from prefillshare_train.serving.kv_storage import KVStorage


@dataclass(frozen=True)
class PackedJob:
    """Run a packed row of prompt pieces, each going on where its past ends.

    Attributes:
        storage: where past K/V are read and new ones written.
        groups: the row's segments; their pasts lie end to end in `past_slots`.
        past_slots: (P,) int64, or None where no segment has a past.
        write_slots: (T,) int64, where the row's own K/V go.
        last_layer: layer at which to stop once its K/V are written, or None.
    """

    storage: KVStorage
    groups: tuple[SegmentGroup, ...]
    past_slots: Tensor | None
    write_slots: Tensor
    last_layer: int | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.storage.write(layer, self.write_slots, new_keys, new_values)
        if layer == self.last_layer:
            raise LastLayerReached
        past = None
        if self.past_slots is not None:
            past = self.storage.read(layer, self.past_slots)
        return attend_segments(
            query,
            key,
            value,
            self.groups,
            past,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            sinks=sinks,
        )


class Scratch:
    """Memory that a layer's gathered K/V go through, kept from step to step.

    A fresh allocation of this size would be mapped and unmapped by the C library every time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of a shape, its contents undefined."""
        size = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = like.new_empty(size + size // 4)
        return held[:size].view(shape)


@dataclass
class DecodeJob:
    """Run one token a row, over the base's blocks of its prompt and blocks of its own.

    Attributes:
        storage: where all blocks lie.
        tables: (R, W) int64 block numbers: prompt blocks, then own blocks, then any block.
        write_slots: (R,) int64, where each row's K/V go.
        base_tokens: (R,) prompt tokens that the base supplies.
        own_starts: (R,) slots of the row's table before its own blocks.
        own_tokens: (R,) K/V that the row holds of its own, this step's included.
    """

    storage: KVStorage
    tables: Tensor
    write_slots: Tensor
    base_tokens: Tensor
    own_starts: Tensor
    own_tokens: Tensor
    scratch: Scratch
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        self.storage.write(layer, self.write_slots, key[:, :, 0], value[:, :, 0])
        keys = self._gather("keys", self.storage.keys[layer])
        values = self._gather("values", self.storage.values[layer])
        mask = self._mask(sliding_window)
        return masked_attention(query, keys, values, mask, scaling, sinks=sinks)

    def _gather(self, name: str, slots: Tensor) -> Tensor:
        """The rows' K or V of a layer, (R, H_kv, W * block_tokens, D)."""
        rows, width = self.tables.shape
        size = self.storage.block_tokens
        blocks = slots.view(-1, size, *slots.shape[1:])
        shape = (rows * width, *blocks.shape[1:])
        buffer = self.scratch.take(name, shape, slots)
        torch.index_select(blocks, 0, self.tables.flatten(), out=buffer)
        return buffer.view(rows, width * size, *slots.shape[1:]).transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        """(R, 1, 1, W * block_tokens) booleans: the row's own tokens, inside the layer's window."""
        if window not in self._masks:
            width = self.tables.shape[1] * self.storage.block_tokens
            slot = torch.arange(width, device=self.tables.device)[None]
            own = slot - self.own_starts[:, None]
            of_base = slot < self.base_tokens[:, None]
            seen = of_base | ((own >= 0) & (own < self.own_tokens[:, None]))
            if window is not None:
                # Keys were rotated by their positions, which the slots of own blocks are not.
                position = torch.where(of_base, slot, own + self.base_tokens[:, None])
                last = self.base_tokens + self.own_tokens - 1
                seen &= last[:, None] - position < window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]
