"""Which blocks are free, held, or kept in the hope that someone asks for them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class NoBlocksError(RuntimeError):
    """More blocks were asked for than are free or can be evicted."""


class BlockPool:
    """Reference counts over a range of blocks, with LRU eviction of unreferenced ones.

    Args:
        blocks: the block numbers of this pool.
        on_evict: called with a findable block that is given up for room, before it is reused.

    Attributes:
        peak_filled: most blocks that were held or findable at once.
        evicted: findable blocks given up for room so far.
    """

    def __init__(self, blocks: Sequence[int], on_evict: Callable[[int], None]) -> None:
        self._free = list(reversed(blocks))
        self._references = dict.fromkeys(blocks, 0)
        self._findable: set[int] = set()
        self._unreferenced: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict
        self.size = len(blocks)
        self.peak_filled = 0
        self.evicted = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give out now."""
        return len(self._free) + len(self._unreferenced)

    @property
    def held(self) -> int:
        """Blocks with a reference."""
        return self.size - self.available

    @property
    def cached(self) -> int:
        """Findable blocks without a reference."""
        return len(self._unreferenced)

    def is_held(self, block: int) -> bool:
        """Whether anybody holds a reference to a block."""
        return self._references[block] > 0

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each, for the caller alone to write.

        Raises:
            NoBlocksError: too few are free or evictable; nothing was taken.
        """
        if count > self.available:
            raise NoBlocksError(f"{count} blocks asked for, {self.available} available")
        taken = []
        for _ in range(count):
            if not self._free:
                self._evict_oldest()
            block = self._free.pop()
            self._references[block] = 1
            taken.append(block)
        self.peak_filled = max(self.peak_filled, self.size - len(self._free))
        return taken

    def _evict_oldest(self) -> None:
        block, _ = self._unreferenced.popitem(last=False)
        self._on_evict(block)
        self._findable.discard(block)
        self._free.append(block)
        self.evicted += 1

    def share(self, block: int) -> None:
        """One more reference to a findable or held block."""
        self._unreferenced.pop(block, None)
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each block.

        Findable ones without references stay until room is needed, those given first the longest:
        the end of a prompt is of use to fewer than its beginning, so it goes first.
        """
        for block in reversed(list(blocks)):
            count = self._references[block]
            if count < 1:
                raise RuntimeError(f"block {block} is released more often than it was taken")
            self._references[block] = count - 1
            if count == 1:
                if block in self._findable:
                    self._unreferenced[block] = None
                else:
                    self._free.append(block)

    def set_findable(self, block: int) -> None:
        """Keep a block, which someone holds, once its last reference is gone."""
        self._findable.add(block)

    def forget(self, block: int) -> None:
        """Stop keeping a block; it is free as soon as nobody holds it."""
        self._findable.discard(block)
        if block in self._unreferenced:
            del self._unreferenced[block]
            self._free.append(block)
