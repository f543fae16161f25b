"""Prompts that are being prefilled, so that a second request for the same prefix waits for them."""

from __future__ import annotations

from collections.abc import Sequence

from prefillshare_train.serving.prefix_cache import Key, block_key, common_prefix


class InFlight:
    """Blocks that running prefills will leave, by the key of the block before each."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._coming: dict[Key, list[tuple[str, tuple[int, ...]]]] = {}
        self._parents: dict[str, list[Key]] = {}

    def add(self, request_id: str, parent: Key, tokens: Sequence[int]) -> None:
        """Announce the blocks of `tokens`, which follow the block `parent`."""
        parents = self._parents.setdefault(request_id, [])
        for start in range(0, len(tokens), self._block_tokens):
            block = tuple(tokens[start : start + self._block_tokens])
            self._coming.setdefault(parent, []).append((request_id, block))
            parents.append(parent)
            parent = block_key(parent, block)

    def remove(self, request_id: str) -> None:
        """Withdraw what a request announced, because it is in place or will never be."""
        for parent in self._parents.pop(request_id, ()):
            left = [i for i in self._coming.get(parent, ()) if i[0] != request_id]
            if left:
                self._coming[parent] = left
            else:
                self._coming.pop(parent, None)

    def worth_waiting(self, parent: Key, rest: Sequence[int], kept: int) -> bool:
        """Whether what a prompt lacks after `parent` is coming, or half a block of it at least.

        A few tokens in common (a template's first words) are run sooner than waited for.

        Args:
            rest: the prompt's tokens after `parent`.
            kept: how many of them are in place already.
        """
        wanted = rest[: self._block_tokens]
        enough = min(len(wanted) - kept, max(1, self._block_tokens // 2))
        return any(
            common_prefix(block, wanted) - kept >= max(1, enough)
            for _, block in self._coming.get(parent, ())
        )
