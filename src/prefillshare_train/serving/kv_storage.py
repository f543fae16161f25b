"""The memory of the KV block pool: fixed-size blocks of tokens, every layer's K and V."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefillshare_train.core.modules import empty_cache


@dataclass(frozen=True)
class KVGeometry:
    """Shape of one token's K/V.

    Attributes:
        layers, kv_heads, head_dim: as in the model's configuration.
        dtype: of K and V.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> KVGeometry:
        """The geometry of a loaded model's K/V."""
        cache = empty_cache((0,), model)
        kv_heads, _, head_dim = cache.keys[0].shape
        return cls(len(cache.keys), kv_heads, head_dim, model.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVStorage:
    """K/V of `blocks` blocks. Slot `block * block_tokens + i` is a block's token i.

    Args:
        geometry: of one token.
        blocks: how many.
        block_tokens: tokens in a block.
        device: where the memory lies.
        memory: shared memory to lie in, of shape `shape`; allocated where None.

    Attributes:
        keys, values: one view of shape (slots, H_kv, D) for each layer.
        versions: how often a block was changed by a copy, for those who mirror it elsewhere.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        blocks: int,
        block_tokens: int,
        device: torch.device | str = "cpu",
        memory: Tensor | None = None,
    ) -> None:
        self.geometry = geometry
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.memory = (
            torch.zeros(self.shape, dtype=geometry.dtype, device=device)
            if memory is None
            else memory
        )
        flat = self.memory.flatten(2, 3)
        self.versions: Counter[int] = Counter()
        self.keys = [flat[layer, 0] for layer in range(geometry.layers)]
        self.values = [flat[layer, 1] for layer in range(geometry.layers)]

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, 2, blocks, block_tokens, H_kv, D)."""
        g = self.geometry
        return (g.layers, 2, self.blocks, self.block_tokens, g.kv_heads, g.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_tokens * self.geometry.token_bytes

    @property
    def device(self) -> torch.device:
        """Where the memory lies."""
        return self.memory.device

    def slots(self, blocks: Sequence[int], start: int, end: int) -> list[int]:
        """Slots of tokens `[start, end)` of a run of blocks."""
        size = self.block_tokens
        return [blocks[i // size] * size + i % size for i in range(start, end)]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put K and V of shape (tokens, H_kv, D) at `slots`, (tokens,) int64."""
        self.keys[layer].index_copy_(0, slots, key.to(self.geometry.dtype))
        self.values[layer].index_copy_(0, slots, value.to(self.geometry.dtype))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at `slots`, each (H_kv, tokens, D)."""
        keys, values = self.keys[layer][slots], self.values[layer][slots]
        return keys.transpose(0, 1), values.transpose(0, 1)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros."""
        if blocks:
            self.memory.index_fill_(2, torch.tensor(list(blocks), device=self.device), 0)

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Copy a block's first tokens into another block."""
        self.memory[:, :, target, :count] = self.memory[:, :, source, :count]
        self.versions[target] += 1

    def take_out(self, block: int) -> Tensor:
        """A copy of a block in host memory, (layers, 2, block_tokens, H_kv, D)."""
        return self.memory[:, :, block].to("cpu", copy=True)

    def put_back(self, block: int, content: Tensor) -> None:
        """Fill a block with what `take_out` gave."""
        self.memory[:, :, block] = content.to(self.device)
        self.versions[block] += 1
