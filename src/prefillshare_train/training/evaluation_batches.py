"""Evaluation batches over ranks: each row is counted once, and every rank runs as many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from prefillshare_train.core.spans import Conversation

COUNTED = "counted"


class EvaluationBatches(IterableDataset[dict[str, Any]]):
    """One rank's share of the evaluation batches, packed.

    Sharded models gather their parameters together, so that every rank must run as many batches as
    the others. Where they do not come out even, a rank runs its first conversation again, marked
    `counted: False`. (accelerate's `even_batches` repeats rows that are then counted twice.)

    Args:
        conversations: all ranks'; the longest neighbours would pack best, but order is kept.
        batch_size: conversations of a batch.
        rank, ranks: of this process.
        collate: packs conversations.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        batch_size: int,
        rank: int,
        ranks: int,
        collate: Callable[[Sequence[Conversation]], dict[str, Any]],
    ) -> None:
        self._rows = conversations
        self._size = batch_size
        self._rank = rank
        self._ranks = ranks
        self._collate = collate

    def __len__(self) -> int:
        """Batches that this rank runs, as many as any other."""
        return -(-len(self._rows) // (self._size * self._ranks))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self)):
            start = (number * self._ranks + self._rank) * self._size
            rows = [self._rows[i] for i in range(start, min(start + self._size, len(self._rows)))]
            batch = self._collate(rows or [self._rows[0]])
            batch[COUNTED] = bool(rows)
            yield batch
