"""The store connector's half beside vLLM's worker: copies blocks between K/V cache and store."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import Tensor

from prefillshare_train.engines.vllm.block_store import BlockStore
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.store_scheduler import Work

logger = logging.getLogger("vllm." + __name__)


class StoreWorker:
    """Moves K/V for one worker, which holds all layers and heads.

    Args:
        num_blocks: blocks of the instance's K/V cache.
    """

    def __init__(self, store: BlockStore, num_blocks: int) -> None:
        self._store = store
        self._num_blocks = num_blocks
        self._layers: list[Tensor] = []
        self.counts: Counter[str] = Counter()

    def register(self, caches: dict[str, Tensor]) -> None:
        """Take the K/V cache of each layer, (blocks, heads, tokens, K and V), of any stride.

        Raises:
            VllmError: the layers differ, or their first dimension is not the blocks.
        """
        self._layers = list(caches.values())
        shapes = {(tuple(layer.shape), layer.dtype) for layer in self._layers}
        if len(shapes) != 1 or self._layers[0].shape[0] != self._num_blocks:
            raise VllmError(
                f"the K/V cache has {self._num_blocks} blocks and layers of "
                f"{sorted(map(str, shapes))}: the store connector needs one shape that begins "
                "with the blocks. Choose another --block-size or attention backend"
            )

    def load(self, work: Work) -> None:
        """Fill blocks before a step."""
        for block_id, found in work.loads:
            block = found if isinstance(found, Tensor) else self._store.take(found)
            for layer, kept in zip(self._layers, block, strict=True):
                layer[block_id].copy_(kept)

    def save(self, work: Work) -> None:
        """Keep blocks after a step. One that cannot be written is left out and counted."""
        for key, block_id in work.stores:
            block = torch.stack([layer[block_id] for layer in self._layers]).cpu()
            try:
                kept = self._store.write(key, block)
            except OSError as error:
                self.counts["dropped_blocks"] += 1
                logger.error("block %s cannot be written to the store: %s", key[:16], error)
                continue
            if not kept:
                logger.error("block %s is larger than the store's whole budget; raise it", key[:16])
        for key in work.ended:
            self._store.end(key, work.writer)
