"""What a prefill replica keeps in its prefix cache, as far as its router can know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from prefillshare_train.engines.vllm.store_keys import block_keys

Key = str


def whole_block_keys(
    prompt_ids: Sequence[int], block_tokens: int, cache_salt: str | None
) -> list[Key]:
    """Keys of a prompt's whole blocks; each names the prompt up to its block's end."""
    # No namespace: all replicas of the pool run one base.
    keys = block_keys("", prompt_ids, block_tokens, cache_salt)
    return keys[: len(prompt_ids) // block_tokens]


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
