"""What a batch of decoding rows holds, and how its rows attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefillshare_train.core.kernels import masked_attention
from prefillshare_train.core.prompt_cache import PromptCache


@dataclass
class DecodeState:
    """K/V of running sequences, padded to one capacity; also the job of a decoding step.

    keys, values: one tensor of shape (slots, H_kv, capacity, D) for each layer; the first B slots
    hold running rows. `lengths`: (B,) tokens held by each; a step writes its K/V at that position
    and then sees one token more.
    """

    slots: int
    lengths: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def add(self, cache: PromptCache, own: PromptCache, room: int) -> None:
        """New rows: each one's shared prompt K/V, the decoder's own beside it, and `room` free."""
        lengths = [n + m for n, m in zip(cache.lengths, own.lengths, strict=True)]
        first = len(self.lengths)

        def put(held: Tensor | None, shared: Tensor, mine: Tensor) -> Tensor:
            heads, _, width = mine.shape
            if held is None or held.shape[2] < max(lengths) + room:
                wider = mine.new_zeros((self.slots, heads, max(lengths) + room, width))
                if held is not None:
                    wider[:first, :, : held.shape[2]] = held[:first]
                held = wider
            spans = zip(cache.starts, cache.lengths, own.starts, own.lengths, strict=True)
            for row, (start, length, own_start, own_length) in enumerate(spans, first):
                end = length + own_length
                held[row, :, :length] = shared[:, start : start + length]
                held[row, :, length:end] = mine[:, own_start : own_start + own_length]
                held[row, :, end:] = 0  # an ended row's infinities would not be masked: 0 * inf
            return held

        nothing: list[Any] = [None] * len(own.keys)
        self.keys = list(map(put, self.keys or nothing, cache.keys, own.keys))
        self.values = list(map(put, self.values or nothing, cache.values, own.values))
        new = torch.tensor(lengths, device=self.lengths.device)
        self.lengths = torch.cat([self.lengths, new])
        self._masks = {}

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these (ascending); which row each of the first slots holds now.

        The last rows move into the slots of those that ended, and the others stay where they are:
        one row's K/V is copied for each that ended, not everybody's.
        """
        count = len(rows)
        kept = set(rows)
        movers = [row for row in rows if row >= count]
        order = [slot if slot in kept else movers.pop() for slot in range(count)]
        for slot, row in enumerate(order):
            if slot != row:
                for layer in (*self.keys, *self.values):
                    layer[slot] = layer[row]
        self.lengths = self.lengths[torch.tensor(order, device=self.lengths.device).long()]
        self._masks = {}
        return order

    def advance(self) -> None:
        """Count the token that the last step wrote."""
        self.lengths = self.lengths + 1
        self._masks = {}

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
        count = query.shape[0]
        keys, values = self.keys[layer][:count], self.values[layer][:count]
        rows = torch.arange(count, device=query.device)
        keys[rows, :, self.lengths] = key[:, :, 0].to(keys.dtype)
        values[rows, :, self.lengths] = value[:, :, 0].to(values.dtype)
        mask = self._mask(sliding_window, keys.shape[2])
        width = mask.shape[-1]
        keys, values = keys[:, :, :width], values[:, :, :width]
        return masked_attention(query, keys, values, mask, scaling, sinks=sinks)

    def _mask(self, window: int | None, capacity: int) -> Tensor:
        """(B, 1, 1, longest) booleans: the row's own tokens, inside the layer's window."""
        if window not in self._masks:
            positions = torch.arange(
                min(int(self.lengths.max()) + 1, capacity), device=self.lengths.device
            )[None]
            last = self.lengths[:, None]
            seen = positions <= last
            if window is not None:
                seen &= last - positions < window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]
