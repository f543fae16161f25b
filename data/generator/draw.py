"""Random choices that give the same bytes on every machine and every Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_SEED_STRIDE = 1_000_000


def first_draw(seed: int) -> int:
    """Number of the first row that a seed draws; no seed makes as many as lie between two."""
    return seed * _SEED_STRIDE


class Draw:
    """A seeded stream of choices.

    Built on `random.Random.random()` alone: it is the one method whose sequence for a seed Python
    promises to keep.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key)))

    def integer(self, low: int, high: int, step: int = 1) -> int:
        """A whole number from low to high, both included."""
        return low + step * int(self._random.random() * ((high - low) // step + 1))

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return self._random.random() < share

    def choice(self, items: Sequence[T]) -> T:
        """One item."""
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` items at different places, in random order."""
        pool = list(items)
        if not 0 <= count <= len(pool):
            raise ValueError(f"cannot draw {count} of {len(pool)} items")
        for place in range(count):
            other = self.integer(place, len(pool) - 1)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))

    def weighted(self, weights: dict[T, float]) -> T:
        """One key, by its share."""
        point = self._random.random() * sum(weights.values())
        for item, weight in weights.items():
            point -= weight
            if point < 0:
                return item
        return item
