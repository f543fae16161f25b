"""The engine: one loop that admits, decodes and prefills, and one thread that runs it."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from prefillshare_train.data import Renderer
from prefillshare_train.serving.api import (
    EngineStats,
    EngineStoppedError,
    Event,
    EventSink,
    FinishReason,
    Generation,
    GenerationRequest,
    QueueFullError,
    ServingError,
)
from prefillshare_train.serving.assembly import make_storage, make_workers
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.intake import Intake, session_name
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.prefix_cache import PrefixCache
from prefillshare_train.serving.sampling import pick_token
from prefillshare_train.serving.scheduler import Scheduler
from prefillshare_train.serving.sequence import Sequence, State
from prefillshare_train.serving.sessions import SessionTable
from prefillshare_train.serving.stats import Sums, collect_stats
from prefillshare_train.serving.workers import PrefillReport, PrefillWorker

logger = logging.getLogger(__name__)
_IDLE_S = 0.05
_RATE_WINDOW = 64
_STOP_S = 30.0
_NO_WORKER = "no prefill worker is left"


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
        each = self.storage.blocks // self.config.workers
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pool_blocks = each
        self._intake = Intake(models, self.config, self.storage, each)
        self._set_up(range(self.config.workers))
        self._workers = make_workers(models, self.config, self.storage, self._receive)
        self._lost_workers: list[PrefillWorker] = []
        self._live: dict[str, Sequence] = {}
        self._lock = threading.Lock()
        self._accepting = True
        self._queued = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._sums = Sums()
        self._finished: Counter[str] = Counter()
        self._ends: list[float] = []

    def _set_up(self, workers: Iterable[int]) -> None:
        """Empty pools for the workers, no session, nothing scheduled."""
        each, count = self._pool_blocks, self.config.workers
        self._caches = {
            number: PrefixCache(
                self.storage,
                range(number * each, (number + 1) * each),
                self.config.staging_bytes // count,
            )
            for number in workers
        }
        reserve = -(-self.config.session_tokens // self.config.block_tokens)
        self._sessions = SessionTable(
            min(reserve, each), self.config.session_idle_s, self._release_pinned
        )
        self._scheduler = Scheduler(self.config, self.storage, self._caches, self._sessions)
        self._batches: dict[int, list[tuple[Sequence, int]]] = {}

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
            if request.request_id in self._live:
                raise ServingError(f"a request called {request.request_id} is running")
            if self._queued >= self.config.max_waiting:
                raise QueueFullError(self._queued, self._retry_after())
            self._queued += 1
            self._live[request.request_id] = seq
            # Under the lock, so that no cancel of this request can come before it.
            self._inbox.put(lambda: self._enqueue(seq))

    def cancel(self, request_id: str) -> None:
        """End a request within one step and free its blocks; unknown ones are ignored."""
        self._inbox.put(lambda: self._cancel(request_id))

    def end_session(self, session: str) -> None:
        """Give up a session's reservation; unknown ones are ignored."""
        names = [session]
        if self.config.mode == "isolated":
            names = [f"{session_name(session, decoder)}" for decoder in self.decoders]
        for name in names:
            self._inbox.put(functools.partial(self._sessions.end, name))

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
            self._scheduler,
            self._sessions,
            list(self._caches.values()),
            self._sums,
            waiting=self._queued,
            finished=dict(self._finished),
            workers_alive=len(self._workers),
            workers_total=self.config.workers,
        )

    # -- its thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Run the loop in a thread of its own."""
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
        for worker in (*self._workers.values(), *self._lost_workers):
            worker.close()
        if self._thread is not None:
            self._thread.join()

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
                self._start_over()

    def _wait(self) -> None:
        try:
            command = self._inbox.get(timeout=_IDLE_S)
        except queue.Empty:
            return
        command()

    def _start_over(self) -> None:
        """End what runs with an error and begin with empty pools.

        Whatever broke a step may have left the books wrong, and wrong books would give one request
        the blocks of another.
        """
        old = self._scheduler
        running = (*old.prefilling, *old.ready, *old.decoding)
        with self._lock:
            lost = [seq for seq in self._live.values() if seq in running or seq.worker >= 0]
        # Workers may still write into blocks that are about to be given away.
        self._batches = {number: [] for number in self._batches}
        while self._batches:
            try:
                self._wait()
            except Exception:  # the old books are wrong; what matters here is the reports
                logger.exception("a command failed while the engine started over")
        for cache in self._caches.values():
            self._sums.keep(cache)
        waiting = [seq for seq in self._scheduler.waiting if seq not in lost]
        self._set_up(list(self._workers))
        self._scheduler.waiting = waiting
        for seq in lost:
            if seq.state is not State.ENDED:
                seq.state = State.ENDED
                self._report_end(seq, "error", error="the engine failed in a step; see its log")

    # -- one step ---------------------------------------------------------------------------

    def step(self) -> bool:
        """Take in what came, admit, decode one token a row, hand prefill its next pieces.

        Returns:
            Whether anything ran.
        """
        self._take_in()
        now = time.monotonic()
        self._sessions.expire(now, {seq.session for seq in self._scheduler.waiting})
        self._scheduler.admit(now)
        self._count_waiting()
        decoded = self._decode()
        prefilled = self._prefill()
        return decoded or prefilled

    def _take_in(self) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _count_waiting(self) -> None:
        with self._lock:
            running = self._scheduler.running
            self._queued = len(self._live) - running

    def _prefill(self) -> bool:
        started = False
        now = time.monotonic()
        for number, worker in list(self._workers.items()):
            if number in self._batches:
                continue
            batch = self._scheduler.next_prefill(number, now)
            if not batch:
                continue
            pieces = [seq.next_piece(self.storage, count) for seq, count in batch]
            for seq, count in batch:
                seq.scheduled += count
            self._batches[number] = batch
            started = True
            try:
                worker.start(pieces)
            except OSError as error:  # a process or an address that is gone
                self._receive(PrefillReport(number, 0.0, str(error), lost=True))
        return started

    def _receive(self, report: PrefillReport) -> None:
        self._inbox.put(lambda: self._prefilled(report))

    def _prefilled(self, report: PrefillReport) -> None:
        batch = self._batches.pop(report.worker, [])
        if report.lost:
            self._lose_worker(report.worker, report.error or "it is gone")
        elif report.error is not None:
            # Not the worker's fault: on another the same prompts would fail again.
            for seq, _ in batch:
                self._finish(seq, "error", error=f"the prefill failed: {report.error}")
        else:
            self._sums.prefill_seconds += report.seconds
            self._sums.handover_seconds += report.handover_s
            self._sums.prefill_batches += 1
            for seq, count in batch:
                self._scheduler.prefilled(seq, count)
        for seq, _ in batch:
            if seq.cancelled:
                self._finish(seq, "cancelled")

    def _decode(self) -> bool:
        scheduler = self._scheduler
        start = time.perf_counter()
        for seq in scheduler.promote():
            piece = seq.prompt_end_piece(self.storage)
            if piece is not None:
                seq.decoder.lane.run_prompt_ends(self.storage, [piece], seq.decoder.adapter)
                seq.own_tokens = len(piece.ids)
        rows = list(scheduler.decoding)
        if not rows:
            return False
        for lane in dict.fromkeys(seq.decoder.lane for seq in rows):
            mine = [seq for seq in rows if seq.decoder.lane is lane]
            logits = lane.step(self.storage, [seq.decode_row() for seq in mine])
            most_likely = logits.argmax(dim=-1).tolist()
            now = time.monotonic()
            for row, seq in enumerate(mine):
                try:
                    history = functools.partial(_history, seq)
                    token, entry = pick_token(logits[row], most_likely[row], seq.picker, history)
                    seq.own_tokens += 1
                    self._emit(seq, token, entry, now)
                except Exception as error:  # one row's fault is not the others'
                    logger.exception("%s failed", seq.request.request_id)
                    self._finish(seq, "error", error=f"{type(error).__name__}: {error}")
        self._sums.decode_seconds += time.perf_counter() - start
        self._sums.decode_steps += 1
        self._sums.decode_rows += len(rows)
        return True

    def _emit(self, seq: Sequence, token: int, entry: Any, now: float) -> None:
        seq.response.append(token)
        if seq.first_token_at is None:
            seq.first_token_at = now
        sampling = seq.request.sampling
        ends = not sampling.ignore_eos and token in self.renderer.end_token_ids
        asked = token in sampling.stop_token_ids
        text = seq.detokenizer.push(token)
        stopped_by = seq.detokenizer.stopped_by
        reason: FinishReason | None = None
        if ends or asked or stopped_by is not None:
            reason = "stop"
        elif len(seq.response) >= sampling.max_tokens:
            reason = "length"
        if reason is not None and stopped_by is None:
            text += seq.detokenizer.finish()
        event = Event(seq.request.request_id, (token,), text, (entry,) if entry is not None else ())
        if reason is None:
            self._send(seq, event)
        else:
            stop: str | int | None = stopped_by if stopped_by is not None else None
            if stop is None and asked:
                stop = token
            self._finish(seq, reason, event=event, stop_reason=stop)

    # -- ends -------------------------------------------------------------------------------

    def _enqueue(self, seq: Sequence) -> None:
        self._scheduler.waiting.append(seq)
        if not self._workers:
            self._finish(seq, "error", error=_NO_WORKER)

    def _cancel(self, request_id: str) -> None:
        seq = self._live.get(request_id)
        if seq is None or seq.state is State.ENDED:
            return
        seq.cancelled = True
        if not any(seq is other for batch in self._batches.values() for other, _ in batch):
            self._finish(seq, "cancelled")
        # Otherwise a worker is writing into its blocks: it ends with the worker's report.

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        *,
        event: Event | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        if seq.state is not State.ENDED:
            self._scheduler.remove(seq, time.monotonic())
            self._report_end(seq, reason, event=event, stop_reason=stop_reason, error=error)

    def _report_end(
        self,
        seq: Sequence,
        reason: FinishReason,
        *,
        event: Event | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        now = time.monotonic()
        usage = seq.usage(now)
        self._sums.add(usage)
        self._finished[reason] += 1
        self._ends = [*self._ends[1 - _RATE_WINDOW :], now]
        with self._lock:
            self._live.pop(seq.request.request_id, None)
        last = event or Event(seq.request.request_id)
        end = replace(last, finish_reason=reason, stop_reason=stop_reason, error=error, usage=usage)
        self._send(seq, end)

    def _send(self, seq: Sequence, event: Event) -> None:
        try:
            seq.sink(event)
        except Exception:  # a broken client must not stop the others
            logger.exception("the sink of %s failed; the request is cancelled", event.request_id)
            if event.finish_reason is None:
                self.cancel(event.request_id)

    def _lose_worker(self, number: int, error: str) -> None:
        """Drop a dead worker's blocks from the cache; what it was running waits anew."""
        if number not in self._workers:
            return
        logger.error("prefill worker %d is lost: %s", number, error)
        self._lost_workers.append(self._workers.pop(number))
        self._sessions.drop_worker(number)
        cache = self._caches.pop(number)
        self._sums.keep(cache)
        cache.drop_all()
        # Responses that decode go on: what the worker had finished is in memory that we hold.
        for seq in [s for s in self._scheduler.prefilling if s.worker == number]:
            self._scheduler.send_back(seq)
        if not self._workers:
            with self._lock:
                self._accepting = False
            for seq in list(self._scheduler.waiting):
                self._finish(seq, "error", error=_NO_WORKER)

    def _release_pinned(self, worker: int, blocks: Any) -> None:
        cache = self._caches.get(worker)
        if cache is not None:
            cache.pool.release(blocks)

    def _retry_after(self) -> float:
        """Seconds until a place is likely free, from the rate at which requests ended of late."""
        if len(self._ends) < 2:
            return 1.0
        span = self._ends[-1] - self._ends[0]
        return min(60.0, max(1.0, span / (len(self._ends) - 1)))


def _history(seq: Sequence) -> tuple[int, ...]:
    return (*seq.request.prompt_ids, *seq.response)
