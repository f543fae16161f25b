"""Prefill in processes of its own: prompt K/V go from one to the other through shared memory.

The engine's process holds all bookkeeping. A worker process is told which tokens to run and which
slots to read and write; what it writes is in the memory that the engine decodes from, so the
hand-over is one hop without a copy: the message that says it is done.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import PreTrainedModel

from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import Piece, run_pieces
from prefillshare_train.serving.workers import PrefillReport, Report

_START_S = 120.0


def shared_storage(geometry: KVGeometry, blocks: int, block_tokens: int) -> KVStorage:
    """Storage in memory that other processes can map.

    Raises:
        ServingError: the machine's shared memory is too small.
    """
    size = blocks * block_tokens * geometry.token_bytes
    free = os.statvfs("/dev/shm")
    if size > free.f_bavail * free.f_frsize:
        raise ServingError(
            f"disaggregated serving needs {size >> 20} MiB of shared memory for the KV blocks and "
            f"{(free.f_bavail * free.f_frsize) >> 20} MiB are free in /dev/shm; lower kv_bytes, or "
            "enlarge /dev/shm"
        )
    memory = KVStorage(geometry, blocks, block_tokens).memory.share_memory_()
    return KVStorage(geometry, blocks, block_tokens, memory=memory)


def divide_threads(workers: int) -> int:
    """Threads for each of the engine and its prefill processes, and set the engine's.

    PyTorch gives every process a thread a core; those of several processes would then wait for
    each other in busy loops.
    """
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // (workers + 1))
    torch.set_num_threads(threads)
    return threads


class ProcessWorker:
    """A prefill worker in a process of its own.

    Args:
        storage: from `shared_storage`.
        threads: of the process.

    Raises:
        ServingError: the process does not come up.
    """

    def __init__(
        self,
        number: int,
        model: PreTrainedModel,
        storage: KVStorage,
        report: Report,
        threads: int = 1,
    ) -> None:
        self._number = number
        self._report = report
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(
                theirs,
                model.share_memory(),
                storage.memory,
                storage.geometry,
                storage.block_tokens,
                threads,
            ),
            name=f"prefill-{number}",
            daemon=True,
        )
        self.process.start()
        # At exit multiprocessing sends what is left SIGTERM, which it ignores, and waits for it.
        atexit.register(self.process.kill)
        theirs.close()
        if not self._connection.poll(_START_S):
            self.process.kill()
            raise ServingError(f"prefill worker {number} did not start in {_START_S:.0f} s")
        try:
            self._connection.recv_bytes()
        except EOFError:
            self.process.join()
            raise ServingError(
                f"prefill worker {number} ended while it started, with exit code "
                f"{self.process.exitcode}; its error is above"
            ) from None
        self._thread = threading.Thread(target=self._listen, name=f"reports-{number}", daemon=True)
        self._thread.start()

    def start(self, pieces: Sequence[Piece]) -> None:
        """Send the batch to the process.

        Raises:
            OSError: the process is gone.
        """
        batch = [[list(p.ids), list(p.past_slots), list(p.write_slots)] for p in pieces]
        self._connection.send_bytes(json.dumps(batch).encode())

    def close(self) -> None:
        """End the process after its batch."""
        with contextlib.suppress(OSError):  # it may be gone already
            self._connection.send_bytes(b"null")
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._thread.join()
        self._connection.close()
        atexit.unregister(self.process.kill)

    def _listen(self) -> None:
        while True:
            try:
                answer = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                self.process.join(1)
                reason = f"its process ended with exit code {self.process.exitcode}"
                self._report(PrefillReport(self._number, 0.0, reason, lost=True))
                return
            if answer is None:
                return
            hop = time.monotonic() - answer["finished_at"]
            self._report(
                PrefillReport(self._number, answer["seconds"], answer["error"], handover_s=hop)
            )


def _serve(
    connection: multiprocessing.connection.Connection,
    model: PreTrainedModel,
    memory: torch.Tensor,
    geometry: KVGeometry,
    block_tokens: int,
    threads: int,
) -> None:
    """Run batches until told to end, or until the engine is gone."""
    # Ctrl-C reaches the whole group, as does a service manager's SIGTERM. The engine drains first,
    # and then ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(threads)
    storage = KVStorage(geometry, memory.shape[2], block_tokens, memory=memory)
    connection.send_bytes(b"ready")
    while True:
        try:
            batch = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if batch is None:
            connection.send_bytes(b"null")
            return
        start = time.perf_counter()
        answer: dict[str, Any] = {"error": None}
        try:
            run_pieces(model, storage, [Piece(*piece) for piece in batch], stop_early=True)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answer["seconds"] = time.perf_counter() - start
        answer["finished_at"] = time.monotonic()
        connection.send_bytes(json.dumps(answer).encode())
