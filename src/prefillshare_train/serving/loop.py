"""The engine's loop: admit, decode one token a row, hand prefill its next pieces.

Nothing in here is called from two threads; what comes from others is posted and run between steps.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from prefillshare_train.serving.api import Event, FinishReason
from prefillshare_train.serving.assembly import make_workers
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.prefix_cache import PrefixCache
from prefillshare_train.serving.sampling import pick_token
from prefillshare_train.serving.scheduler import Scheduler
from prefillshare_train.serving.sequence import Sequence, State
from prefillshare_train.serving.sessions import SessionTable
from prefillshare_train.serving.stats import Sums
from prefillshare_train.serving.workers import PrefillReport, PrefillWorker

logger = logging.getLogger(__name__)
_NO_WORKER = "no prefill worker is left"


class Loop:
    """Every request that has not ended, and the memory, workers and sessions that serve them.

    Args:
        storage: the memory of all blocks, divided evenly among the prefill workers.
        post: has a call made in the loop's thread, between steps; safe from any thread.
        on_end: called with a request that has ended, just before its last event is sent.

    Attributes:
        caches, workers: of living prefill workers, by number; `lost_workers` are to be closed.
        batches: what each busy worker runs: requests with counts of prompt tokens.
    """

    def __init__(
        self,
        models: ServedModels,
        config: EngineConfig,
        storage: KVStorage,
        post: Callable[[Callable[[], None]], None],
        on_end: Callable[[Sequence], None],
    ) -> None:
        self._models = models
        self._config = config
        self._storage = storage
        self._post = post
        self._on_end = on_end
        self._open: dict[str, Sequence] = {}
        self.sums = Sums()
        self.finished: Counter[str] = Counter()
        self._set_up(range(config.workers))
        self.workers = make_workers(models, config, storage, self.receive)
        self.lost_workers: list[PrefillWorker] = []

    def _set_up(self, workers: Iterable[int]) -> None:
        """Empty pools for the workers, no session, nothing scheduled."""
        count = self._config.workers
        each = self._storage.blocks // count
        self.caches = {
            number: PrefixCache(
                self._storage,
                range(number * each, (number + 1) * each),
                self._config.staging_bytes // count,
            )
            for number in workers
        }
        reserve = -(-self._config.session_tokens // self._config.block_tokens)
        reserve *= len(self._models.decoders) if self._config.mode == "isolated" else 1
        self.sessions = SessionTable(
            min(reserve, each), self._config.session_idle_s, self._release_pinned
        )
        self.scheduler = Scheduler(self._config, self._storage, self.caches, self.sessions)
        self.batches: dict[int, list[tuple[Sequence, int]]] = {}

    def step(self) -> bool:
        """Run one step; whether anything ran."""
        now = time.monotonic()
        self.sessions.expire(now, {seq.session for seq in self.scheduler.waiting})
        self.scheduler.admit(now)
        started = self._run_own_prompts()
        decoded = self._decode()
        prefilled = self._prefill()
        return started or decoded or prefilled

    def _prefill(self) -> bool:
        started = False
        now = time.monotonic()
        for number, worker in list(self.workers.items()):
            if number in self.batches:
                continue
            batch = self.scheduler.next_prefill(number, now)
            if not batch:
                continue
            pieces = [seq.next_piece(self._storage, count) for seq, count in batch]
            for seq, count in batch:
                seq.scheduled += count
            try:
                worker.start(pieces)
            except OSError as error:  # a process or an address that is gone
                self.receive(PrefillReport(number, 0.0, str(error), lost=True))
            # Only now: a batch that never began has no report that would take it out again.
            self.batches[number] = batch
            started = True
        return started

    def receive(self, report: PrefillReport) -> None:
        """Take a worker's report, from whatever thread."""
        self._post(lambda: self._prefilled(report))

    def _prefilled(self, report: PrefillReport) -> None:
        batch = self.batches.pop(report.worker, [])
        if report.lost:
            self._lose_worker(report.worker, report.error or "it is gone")
        elif report.error is not None:
            # Not the worker's fault: on another the same prompts would fail again.
            for seq, _ in batch:
                self._finish(seq, "error", error=f"the prefill failed: {report.error}")
        else:
            self.sums.prefill_seconds += report.seconds
            self.sums.handover_seconds += report.handover_s
            self.sums.prefill_batches += 1
            for seq, count in batch:
                self.scheduler.prefilled(seq, count)
        for seq, _ in batch:
            if seq.cancelled:
                self._finish(seq, "cancelled")

    def _run_own_prompts(self) -> bool:
        """Have decoders run prompt tokens of their own, as many as the step's budget has."""
        start = time.perf_counter()
        chosen = self.scheduler.promote()
        for seq, count in chosen:
            piece = seq.next_own_piece(self._storage, count)
            seq.decoder.lane.run_prompt_ends(self._storage, [piece], seq.decoder.adapter)
            self.scheduler.own_prompt_ran(seq, count)
        if chosen:
            self.sums.prefill_seconds += time.perf_counter() - start
        return bool(chosen)

    def _decode(self) -> bool:
        start = time.perf_counter()
        rows = list(self.scheduler.decoding)
        if not rows:
            return False
        for lane in dict.fromkeys(seq.decoder.lane for seq in rows):
            mine = [seq for seq in rows if seq.decoder.lane is lane]
            logits = lane.step(self._storage, [seq.decode_row() for seq in mine])
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
        self.sums.decode_seconds += time.perf_counter() - start
        self.sums.decode_steps += 1
        self.sums.decode_rows += len(rows)
        return True

    def _emit(self, seq: Sequence, token: int, entry: Any, now: float) -> None:
        seq.response.append(token)
        if seq.first_token_at is None:
            seq.first_token_at = now
        sampling = seq.request.sampling
        ends = not sampling.ignore_eos and token in self._models.renderer.end_token_ids
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

    def enqueue(self, seq: Sequence) -> None:
        """Let a new request wait for its turn."""
        self._open[seq.request.request_id] = seq
        self.scheduler.waiting.append(seq)
        if not self.workers:
            self._finish(seq, "error", error=_NO_WORKER)

    def cancel(self, request_id: str) -> None:
        """End a request and free its blocks; unknown ones are ignored."""
        seq = self._open.get(request_id)
        if seq is None:
            return
        seq.cancelled = True
        if not any(seq is other for batch in self.batches.values() for other, _ in batch):
            self._finish(seq, "cancelled")
        # Otherwise a worker is writing into its blocks: it ends with the worker's report.

    def end_session(self, name: str) -> None:
        """Give up a session's reservation, under every salt; unknown ones are ignored."""
        self.sessions.end_named(name)

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
            self.scheduler.remove(seq, time.monotonic())
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
        if usage.started:
            self.sums.add(usage)
        self.finished[reason] += 1
        self._open.pop(seq.request.request_id, None)
        self._on_end(seq)
        last = event or Event(seq.request.request_id)
        end = replace(last, finish_reason=reason, stop_reason=stop_reason, error=error, usage=usage)
        self._send(seq, end)

    def _send(self, seq: Sequence, event: Event) -> None:
        try:
            seq.sink(event)
        except Exception:  # a broken client must not stop the others
            logger.exception("the sink of %s failed; the request is cancelled", event.request_id)
            if event.finish_reason is None:
                self._post(functools.partial(self.cancel, event.request_id))

    def _lose_worker(self, number: int, error: str) -> None:
        """Drop a dead worker's blocks from the cache; what it was running waits anew."""
        if number not in self.workers:
            return
        logger.error("prefill worker %d is lost: %s", number, error)
        self.lost_workers.append(self.workers.pop(number))
        self.sessions.drop_worker(number)
        cache = self.caches.pop(number)
        self.sums.keep(cache)
        cache.drop_all()
        # Responses that decode go on: what the worker had finished is in memory that we hold.
        for seq in [s for s in self.scheduler.prefilling if s.worker == number]:
            self.scheduler.send_back(seq)
        if not self.workers:
            for seq in list(self.scheduler.waiting):
                self._finish(seq, "error", error=_NO_WORKER)

    def start_over(self, wait: Callable[[], None]) -> None:
        """End what runs with an error and begin with empty pools, after a step that failed.

        Whatever broke a step may have left the books wrong, and wrong books would give one request
        the blocks of another.

        Args:
            wait: waits for a posted call and makes it.
        """
        old = self.scheduler
        lost = [seq for seq in self._open.values() if seq in old.admitted or seq.worker >= 0]
        # Workers may still write into blocks that are about to be given away.
        self.batches = {number: [] for number in self.batches}
        while self.batches:
            try:
                wait()
            except Exception:  # the old books are wrong; what matters here is the reports
                logger.exception("a command failed while the engine started over")
        for cache in self.caches.values():
            self.sums.keep(cache)
        waiting = [seq for seq in self.scheduler.waiting if seq not in lost]
        self._set_up(list(self.workers))
        self.scheduler.waiting = waiting
        for seq in lost:
            if seq.state is not State.ENDED:
                seq.state = State.ENDED
                self._report_end(seq, "error", error="the engine failed in a step; see its log")

    def _release_pinned(self, worker: int, blocks: Any) -> None:
        cache = self.caches.get(worker)
        if cache is not None:
            cache.pool.release(blocks)


def _history(seq: Sequence) -> tuple[int, ...]:
    return (*seq.request.prompt_ids, *seq.response)
