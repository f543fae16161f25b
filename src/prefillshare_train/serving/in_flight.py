"""Prompts that are being prefilled, so that a second request for the same prefix waits for them."""

from __future__ import annotations

from collections.abc import Sequence

from prefillshare_train.serving.prefix_cache import Key, block_key, common_prefix

Place = tuple[int, Key]
"""Number of a worker, and the key of a block."""


class InFlight:
    """Blocks that running prefills will leave, by their worker and the key of the block before."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._coming: dict[Place, list[tuple[str, tuple[int, ...]]]] = {}
        self._places: dict[str, list[Place]] = {}

    def add(self, request_id: str, worker: int, parent: Key, tokens: Sequence[int]) -> None:
        """Announce the blocks of `tokens`, which follow the block `parent` on a worker."""
        places = self._places.setdefault(request_id, [])
        for start in range(0, len(tokens), self._block_tokens):
            block = tuple(tokens[start : start + self._block_tokens])
            self._coming.setdefault((worker, parent), []).append((request_id, block))
            places.append((worker, parent))
            parent = block_key(parent, block)

    def remove(self, request_id: str) -> None:
        """Withdraw what a request announced, because it is in place or will never be."""
        for place in self._places.pop(request_id, ()):
            left = [i for i in self._coming.get(place, ()) if i[0] != request_id]
            if left:
                self._coming[place] = left
            else:
                self._coming.pop(place, None)

    def worth_waiting(self, worker: int, parent: Key, rest: Sequence[int], kept: int) -> bool:
        """Whether what a prompt lacks after `parent` is coming, or half a block of it at least.

        A few tokens in common (a template's first words) are run sooner than waited for.

        Args:
            rest: the prompt's tokens after `parent`.
            kept: how many of them are in place already.
        """
        wanted = rest[: self._block_tokens]
        enough = min(len(wanted) - kept, max(1, self._block_tokens // 2))
        return self.coming(worker, parent, wanted) - kept >= max(1, enough)

    def coming(self, worker: int, parent: Key, rest: Sequence[int]) -> int:
        """How many of a prompt's tokens after `parent` will be in place on a worker.

        Args:
            rest: the prompt's tokens after `parent`.
        """
        found = 0
        while found < len(rest):
            wanted = tuple(rest[found : found + self._block_tokens])
            blocks = self._coming.get((worker, parent), ())
            most = max((common_prefix(block, wanted) for _, block in blocks), default=0)
            found += most
            if most < self._block_tokens:
                break
            parent = block_key(parent, wanted)
        return found
