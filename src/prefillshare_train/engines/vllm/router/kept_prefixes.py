"""What a prefill replica keeps in its prefix cache, as far as its router can know."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes


def block_keys(
    prompt_ids: Sequence[int], block_tokens: int, cache_salt: str | None
) -> tuple[Key, ...]:
    """Keys of a prompt's whole blocks; each names the prompt up to its block's end."""
    key = hashlib.sha256((cache_salt or "").encode()).digest()
    keys: list[Key] = []
    for end in range(block_tokens, len(prompt_ids) + 1, block_tokens):
        block = array("q", prompt_ids[end - block_tokens : end])
        key = hashlib.sha256(key + block.tobytes()).digest()
        keys.append(key)
    return tuple(keys)


class KeptPrefixes:
    """Blocks of the prompts that were sent to one replica, the least recently used given up first.

    An estimate: the replica evicts by the same rule, but knows of requests that others sent.

    Args:
        max_blocks: blocks that the replica holds.
    """

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that are thought to be kept."""
        return len(self._keys)

    def match(self, keys: Sequence[Key]) -> int:
        """How many blocks of a prompt are kept, from its beginning without a gap."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def note(self, keys: Sequence[Key]) -> None:
        """A prompt was sent there."""
        # From its end, so that a prompt loses its last blocks first, as it does in vLLM.
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.max_blocks:
            self._keys.popitem(last=False)

    def forget(self) -> None:
        """The replica has started over."""
        self._keys.clear()
