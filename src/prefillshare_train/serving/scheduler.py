"""Who runs next: admission to blocks, prefill under a token budget, decoding rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.in_flight import InFlight
from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.prefix_cache import Match, PrefixCache
from prefillshare_train.serving.router import Candidate, choose_worker, draws
from prefillshare_train.serving.sequence import Sequence, State
from prefillshare_train.serving.sessions import SessionTable


class Scheduler:
    """Keeps every request in its state and decides what the next step runs.

    A request is admitted once all blocks it can ever need are its own, so that nothing that runs
    is ever cut off for want of memory.

    Args:
        caches: each living prefill worker's kept blocks, by its number; the engine removes those
            of workers that died.

    Attributes:
        waiting, prefilling, ready, starting, decoding: requests by state.
        sessions_waiting: sessions that wait for blocks to be promised to them.
    """

    def __init__(
        self,
        config: EngineConfig,
        storage: KVStorage,
        caches: Mapping[int, PrefixCache],
        sessions: SessionTable,
    ) -> None:
        self.config = config
        self.storage = storage
        self.caches = caches
        self.sessions = sessions
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.ready: deque[Sequence] = deque()
        self.starting: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.sessions_waiting = 0
        self._own_prompt_tokens = 0  # given to decoders in this step
        self._in_flight = InFlight(storage.block_tokens)

    @property
    def admitted(self) -> tuple[Sequence, ...]:
        """Requests that hold blocks; for the engine's thread alone."""
        return (*self.prefilling, *self.ready, *self.starting, *self.decoding)

    @property
    def running(self) -> int:
        """How many requests hold blocks."""
        started = len(self.starting) + len(self.decoding)
        return len(self.prefilling) + len(self.ready) + started

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.storage.block_tokens)

    def admit(self, now: float) -> None:
        """Move waiting requests to prefill, those with little to run and long waits first.

        The first that lacks blocks ends the round of its worker, or it would be overtaken for ever;
        one that waits for its session's place, or for a prefix that is being prefilled, does not.
        """
        self._admit(now)
        if self.sessions.reserve_blocks:
            self.sessions_waiting = len(
                {seq.session for seq in self.waiting if not self._places(seq)}
            )

    def _admit(self, now: float) -> None:
        limit = self.config.max_decode_rows + self.config.prefill_ahead
        full: set[int] = set()
        for seq in sorted(self.waiting, key=lambda s: self._priority(s, now)):
            if self.running >= limit or len(full) == len(self.caches):
                return
            matches = {n: self.caches[n].match(seq.root, seq.base_ids) for n in self._places(seq)}
            if not matches:
                continue
            worker = self._route(seq, matches)
            if worker in full:
                continue
            match = matches[worker]
            seq.expected = match.tokens
            if match.tokens < seq.base_tokens and self._worth_waiting(seq, worker, matches):
                continue
            found = self._take_blocks(seq, worker, match)
            if found is None and self._is_idle(worker) and self.sessions.give_up_one(worker):
                match = self.caches[worker].match(seq.root, seq.base_ids)
                found = self._take_blocks(seq, worker, match)
            if found is None:
                full.add(worker)
                continue
            self._start(seq, worker, found, now)

    def _places(self, seq: Sequence) -> list[int]:
        """Workers where a request's session has blocks promised, or can be promised them."""
        fits = self.sessions.fits
        return [n for n, cache in self.caches.items() if fits(seq.session, n, cache.pool.size)]

    def _is_idle(self, worker: int) -> bool:
        return all(seq.worker != worker for seq in self.admitted)

    def _priority(self, seq: Sequence, now: float) -> float:
        waited = now - seq.submitted_at
        return seq.base_tokens - seq.expected - self.config.aging_tokens_per_s * waited

    def _route(self, seq: Sequence, matches: Mapping[int, Match]) -> int:
        """A worker among those where the request's session has a place, by what they keep."""
        if len(matches) == 1:
            return next(iter(matches))
        session = self.sessions.get(seq.session)
        candidates = [
            Candidate(number, match.tokens, self._load(number)) for number, match in matches.items()
        ]
        return choose_worker(candidates, seq.base_tokens, session.worker if session else None)

    def _worth_waiting(self, seq: Sequence, worker: int, matches: Mapping[int, Match]) -> bool:
        """Whether what a prompt lacks is being prefilled, here or where it would then be routed."""
        size = self.storage.block_tokens
        for number, match in matches.items():
            done = len(match.full) * size
            rest = seq.base_ids[done:]
            if number == worker:
                if self._in_flight.worth_waiting(number, match.parent, rest, match.tail_tokens):
                    return True
                continue
            there = done + self._in_flight.coming(number, match.parent, rest)
            if there > matches[worker].tokens and draws(there, seq.base_tokens):
                return True
        return False

    def _load(self, worker: int) -> int:
        size = self.storage.block_tokens
        mine = [s for s in self.admitted if s.worker == worker]
        return sum(s.remaining for s in mine) + size * sum(len(s.own_blocks) for s in mine)

    def _take_blocks(self, seq: Sequence, worker: int, match: Match) -> Match | None:
        """Make blocks the request's own; what was used of the match, None for want of blocks."""
        cache = self.caches[worker]
        own = self._blocks(seq.own_capacity)
        tries = [match]
        others = self.sessions.unused_blocks(worker, seq.session)
        if self._is_idle(worker):
            # Neither promises to others nor a block to copy a tail from may keep out a request
            # that fits into an empty pool.
            others = 0
            tries.append(match.without_tail())
        for found in tries:
            needed = cache.missing_blocks(found, seq.base_tokens) + own
            if cache.pool.available - others >= needed:
                seq.blocks, seq.own_blocks = cache.acquire(found, seq.base_tokens, own)
                return found
        return None

    def _start(self, seq: Sequence, worker: int, match: Match, now: float) -> None:
        seq.worker = worker
        seq.cached = seq.computed = seq.scheduled = match.tokens
        seq.parent = match.parent
        seq.committed = len(match.full) * self.storage.block_tokens
        if seq.started_at is None:
            seq.started_at = now
        request = seq.request
        held = len(seq.blocks) + len(seq.own_blocks)
        seq.turn = self.sessions.begin(seq.session, seq.part, worker, held, request.prompt_ids, now)
        self.waiting.remove(seq)
        if seq.remaining:
            seq.state = State.PREFILLING
            self.prefilling.append(seq)
            rest = seq.base_ids[seq.committed :]
            self._in_flight.add(request.request_id, worker, seq.parent, rest)
        else:
            self._make_ready(seq)

    def _make_ready(self, seq: Sequence) -> None:
        seq.state = State.READY
        self.ready.append(seq)

    def next_prefill(self, worker: int, now: float) -> list[tuple[Sequence, int]]:
        """Requests of a worker with the prompt tokens to run now, within the step's budget."""
        budget = self.config.chunk_tokens - len(self.decoding) - self._own_prompt_tokens
        chosen = []
        mine = [s for s in self.prefilling if s.worker == worker]
        for seq in sorted(mine, key=lambda s: self._urgency(s, now)):
            count = min(budget, seq.remaining)
            if count <= 0:
                continue
            chosen.append((seq, count))
            budget -= count
        return chosen

    def _urgency(self, seq: Sequence, now: float) -> float:
        waited = now - seq.submitted_at
        return seq.remaining - self.config.aging_tokens_per_s * waited

    def prefilled(self, seq: Sequence, count: int) -> None:
        """The base's K/V of a request's next `count` tokens are in place."""
        seq.computed += count
        cache = self.caches[seq.worker]
        size = self.storage.block_tokens
        ids = seq.base_ids
        while seq.committed < seq.computed:
            end = min(seq.committed + size, seq.base_tokens)
            if end > seq.computed:
                break
            block = seq.blocks[seq.committed // size]
            seq.parent = cache.commit(seq.parent, ids[seq.committed : end], block)
            seq.committed = end
        if seq.computed == seq.base_tokens and seq.state is State.PREFILLING:
            self.prefilling.remove(seq)
            self._in_flight.remove(seq.request.request_id)
            self._make_ready(seq)

    def promote(self) -> list[tuple[Sequence, int]]:
        """Give free decoding rows to requests for which the base has done its part.

        Returns:
            Those whose decoders have prompt tokens to run, with how many now. They share the step's
            budget with the base, half of it each where both have something to run.
        """
        while self.ready and len(self.starting) + len(self.decoding) < self.config.max_decode_rows:
            seq = self.ready.popleft()
            seq.state = State.STARTING
            self.starting.append(seq)
        budget = self.config.chunk_tokens - len(self.decoding)
        if self.prefilling:
            budget = max(1, budget // 2)
        chosen = []
        for seq in list(self.starting):
            count = min(budget, seq.own_remaining)
            if count:
                chosen.append((seq, count))
                budget -= count
            elif not seq.own_remaining:
                self._begin_decoding(seq)
        self._own_prompt_tokens = sum(count for _, count in chosen)
        return chosen

    def own_prompt_ran(self, seq: Sequence, count: int) -> None:
        """The decoder's K/V of its next `count` prompt tokens are in place."""
        seq.own_tokens += count
        if not seq.own_remaining:
            self._begin_decoding(seq)

    def _begin_decoding(self, seq: Sequence) -> None:
        self.starting.remove(seq)
        seq.state = State.DECODING
        self.decoding.append(seq)

    def remove(self, seq: Sequence, now: float) -> None:
        """Take a request out, whatever its state, and give its blocks back."""
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        else:
            self._leave_state(seq)
            pool = self.caches[seq.worker].pool if seq.worker in self.caches else None
            # A prompt that the base has not finished is not what the next turn goes on from.
            keep = seq.blocks if pool is not None and seq.computed == seq.base_tokens else []
            ids = (*seq.request.prompt_ids, *seq.response)
            kept = self.sessions.finish(seq.turn, keep, ids, now)
            if pool is not None:
                pool.release(seq.own_blocks if kept else [*seq.blocks, *seq.own_blocks])
        seq.state = State.ENDED
        if seq.request.end_session:
            self.sessions.end(seq.session)

    def send_back(self, seq: Sequence) -> None:
        """A request's worker died before its prompt was in place: let it wait again."""
        self._leave_state(seq)
        self.sessions.abandon(seq.turn)
        seq.turn = None
        seq.forget_blocks()
        self.waiting.append(seq)

    def _leave_state(self, seq: Sequence) -> None:
        if seq.state is State.PREFILLING:
            self.prefilling.remove(seq)
            self._in_flight.remove(seq.request.request_id)
        elif seq.state is State.READY:
            self.ready.remove(seq)
        elif seq.state is State.STARTING:
            self.starting.remove(seq)
        elif seq.state is State.DECODING:
            self.decoding.remove(seq)
