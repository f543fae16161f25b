"""The engine: what callers use, and the thread that runs its loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from prefillshare_train.core.openmp import release_workers
from prefillshare_train.data import Renderer
from prefillshare_train.serving.api import (
    EngineStats,
    EngineStoppedError,
    Event,
    EventSink,
    Generation,
    GenerationRequest,
    QueueFullError,
    ServingError,
)
from prefillshare_train.serving.assembly import make_storage
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.intake import Intake
from prefillshare_train.serving.loop import Loop
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.rate import EndRate
from prefillshare_train.serving.sequence import Sequence
from prefillshare_train.serving.stats import collect_stats

logger = logging.getLogger(__name__)
_IDLE_S = 0.05
_STOP_S = 30.0


class Engine:
    """Serves every decoder of a base off one prefill and one pool of KV blocks.

    Use it as a context manager, or call `start` and `stop`. All public methods may be called from
    any thread; sinks are called in the engine's thread. Without `start`, `step` drives it by hand.

    Args:
        models: what to serve.
        config: see `EngineConfig`.

    Raises:
        ServingError: the byte budget does not hold two blocks a prefill worker or is more than the
            memory that is free, or a worker's process does not come up.
    """

    def __init__(self, models: ServedModels, config: EngineConfig | None = None) -> None:
        self.models = models
        self.config = config or EngineConfig()
        self.storage = make_storage(models, self.config)
        self._intake = Intake(models, self.config, self.storage)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, Sequence] = {}
        self._lock = threading.Lock()
        self._accepting = True
        self._queued = 0
        self._rate = EndRate()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._loop = Loop(models, self.config, self.storage, self._inbox.put, self._ended)

    # -- what callers use -------------------------------------------------------------------

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the served decoders."""
        return tuple(self.models.decoders)

    @property
    def renderer(self) -> Renderer:
        """Makes prompts as the decoders were trained on, and decodes token ids."""
        return self.models.renderer

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that can ever be served with one response token."""
        return self._intake.max_prompt_tokens

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request; its events go to `sink` until one has a finish reason.

        Raises:
            ServingError: it can never be served.
            QueueFullError: the queue is full.
            EngineStoppedError: the engine drains or has stopped.
        """
        seq = self._intake.sequence(request, sink)
        with self._lock:
            if not self._accepting:
                raise EngineStoppedError("the engine is stopping and takes no more requests")
            if not self._loop.workers:
                raise EngineStoppedError("no prefill worker is left")
            if request.request_id in self._live:
                raise ServingError(f"a request called {request.request_id} is running")
            if self._queued >= self.config.max_waiting:
                raise QueueFullError(self._queued, self._rate.seconds_to_the_next())
            self._queued += 1
            self._live[request.request_id] = seq
            # Under the lock, so that no cancel of this request can come before it.
            self._inbox.put(lambda: self._loop.enqueue(seq))

    def cancel(self, request_id: str) -> None:
        """End a request within one step and free its blocks; unknown ones are ignored."""
        self._inbox.put(lambda: self._loop.cancel(request_id))

    def end_session(self, session: str) -> None:
        """Give up a session's reservation, under every salt; unknown ones are ignored."""
        self._inbox.put(lambda: self._loop.end_session(session))

    def generate(self, request: GenerationRequest) -> Generation:
        """Submit a request and wait for the whole response; the engine must have been started.

        Raises:
            See `submit`.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        collected = [events.get()]
        while collected[-1].finish_reason is None:
            collected.append(events.get())
        return Generation.of(collected)

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        return collect_stats(
            self._loop.scheduler,
            self._loop.sessions,
            list(self._loop.caches.values()),
            self._loop.sums,
            waiting=self._queued,
            finished=dict(self._loop.finished),
            workers_alive=len(self._loop.workers),
            workers_total=self.config.workers,
        )

    # -- its thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        # Whoever starts it has loaded the models.
        release_workers()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until those that run have ended; False on a timeout."""
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + timeout_s
        while self._live and time.monotonic() < deadline:
            time.sleep(_IDLE_S)
        return not self._live

    def stop(self) -> None:
        """Cancel what runs, end the thread and the workers."""
        with self._lock:
            self._accepting = False
            live = list(self._live)
        for request_id in live:
            self.cancel(request_id)
        self._stopping.set()
        if self._thread is None:
            while self._live:
                self.step()
        else:
            self._thread.join(_STOP_S)
        # A worker that does not answer would keep its batch, and the thread with it, for ever.
        for worker in (*self._loop.workers.values(), *self._loop.lost_workers):
            worker.close()
        if self._thread is not None:
            self._thread.join(_STOP_S)
            if self._thread.is_alive():
                logger.error("the engine's thread did not end; it goes with the process")

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def _run(self) -> None:
        while not (self._stopping.is_set() and not self._live):
            try:
                if not self.step():
                    self._wait()
            except Exception:
                logger.exception("a step failed; every running request ends with an error")
                self._loop.start_over(self._wait)

    def _wait(self) -> None:
        try:
            command = self._inbox.get(timeout=_IDLE_S)
        except queue.Empty:
            return
        command()

    def step(self) -> bool:
        """Take in what came and run one step of the loop.

        Returns:
            Whether anything ran.
        """
        while not self._inbox.empty():
            self._inbox.get_nowait()()
        ran = self._loop.step()
        self._count_waiting()
        return ran

    def _count_waiting(self) -> None:
        with self._lock:
            self._queued = len(self._live) - self._loop.scheduler.running

    def _ended(self, seq: Sequence) -> None:
        self._rate.note()
        with self._lock:
            self._live.pop(seq.request.request_id, None)
