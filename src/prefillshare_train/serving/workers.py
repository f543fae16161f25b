"""Prefill workers: who runs prompt pieces on the base, in the engine's thread or beside it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.lane import Piece, run_pieces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefillReport:
    """What became of a batch of pieces.

    Attributes:
        worker: number of the worker.
        seconds: time of the forward pass.
        error: what went wrong; None where the K/V are in place.
        lost: whether the worker is gone, and not the batch alone.
        handover_s: from the end of the pass until the engine's process knew of it.
    """

    worker: int
    seconds: float
    error: str | None = None
    lost: bool = False
    handover_s: float = 0.0


Report = Callable[[PrefillReport], None]


class PrefillWorker(Protocol):
    """Runs one batch of pieces at a time and reports when their K/V are in place."""

    def start(self, pieces: Sequence[Piece]) -> None:
        """Begin a batch; its end is reported, from whatever thread it happens in."""
        ...

    def close(self) -> None:
        """End the worker and wait for it."""
        ...


class InlineWorker:
    """Runs each batch in the caller's thread: with one device there is nothing to overlap."""

    def __init__(
        self, number: int, model: PreTrainedModel, storage: KVStorage, report: Report
    ) -> None:
        self._number = number
        self._model = model
        self._storage = storage
        self._report = report

    def start(self, pieces: Sequence[Piece]) -> None:
        """Run the batch at once."""
        start = time.perf_counter()
        error = None
        try:
            run_pieces(self._model, self._storage, pieces, stop_early=True)
        except Exception as fault:  # out of memory, say: the batch's requests end, not the worker
            logger.exception("a prefill failed")
            error = f"{type(fault).__name__}: {fault}"
        self._report(PrefillReport(self._number, time.perf_counter() - start, error))

    def close(self) -> None:
        """Nothing to end."""


class ThreadWorker:
    """Runs batches in a thread of its own; several share the base's weights."""

    def __init__(
        self, number: int, model: PreTrainedModel, storage: KVStorage, report: Report
    ) -> None:
        self._inline = InlineWorker(number, model, storage, report)
        self._batches: queue.SimpleQueue[Sequence[Piece] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"prefill-{number}", daemon=True)
        self._thread.start()

    def start(self, pieces: Sequence[Piece]) -> None:
        """Hand the batch to the thread."""
        self._batches.put(pieces)

    def close(self) -> None:
        """End the thread after its batch."""
        self._batches.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (pieces := self._batches.get()) is not None:
            self._inline.start(pieces)
