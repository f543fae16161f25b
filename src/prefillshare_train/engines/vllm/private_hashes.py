"""Keeps vLLM's own prefix cache from mixing what the base computed with what a decoder did.

vLLM files every full block under a hash of its tokens, the response's included. A decoder's later
turn would find the decoder's own K/V of earlier turns there, where it was trained on the base's;
and vLLM files an adapter's blocks apart from the base's even where they hold the same. So a
decoder's request gets hashes of its own: those of the base for the blocks that the base fills, and
one of a kind, never to be found, for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class PrivateHashes:
    """The block hasher of one decoder request, in place of vLLM's.

    Args:
        request: vLLM's request; its hashes are replaced at once.
        shared_blocks: how many blocks the base fills whole.
        block_size: tokens in a block.
    """

    def __init__(self, request: Any, shared_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        hashes: list[bytes] = []
        if shared_blocks:
            adapter, request.lora_request = request.lora_request, None
            request.block_hashes = []
            hashes = request._block_hasher(request)[:shared_blocks]
            request.lora_request = adapter
        request.block_hashes = hashes
        request._block_hasher = self
        request.update_block_hashes()

    def __call__(self, request: Any) -> list[bytes]:
        """Hashes of the request's full blocks that have none yet."""
        missing = request.num_tokens // self._block_size - len(request.block_hashes)
        return [os.urandom(32) for _ in range(missing)]


def separate(request: Any, shared_blocks: int, block_size: int) -> None:
    """Give a decoder's request its own hashes, unless the instance caches no prefixes."""
    hasher: Callable[[Any], list[bytes]] | None = request._block_hasher
    if hasher is not None:
        PrivateHashes(request, shared_blocks, block_size)


def share_nothing(request: Any) -> None:
    """Replace the hashes of a separated request that are the base's: its blocks hold no base K/V.

    Called before any block of the request is filed.
    """
    if request._block_hasher is not None:
        request.block_hashes = []
        request.update_block_hashes()
