"""Agent sessions: which worker they live on, and the blocks kept for their next turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from prefillshare_train.serving.prefix_cache import common_prefix

SessionKey = tuple[str | None, str]
"""Salt and name: tenants who share no block share no session either."""


@dataclass(eq=False)
class Part:
    """What a session holds in one prefix cache: all decoders share one, or each has its own.

    Attributes:
        pinned: prompt blocks of its last turn, held for the next; `pinned_on`: their worker, which
            may be another than the session's where two of its turns ran at once.
        held: blocks that requests in flight hold.
        ids: prompt and response of its last turn.
    """

    pinned: list[int] = field(default_factory=list)
    pinned_on: int = -1
    held: int = 0
    ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Session:
    """One agent session.

    Attributes:
        worker: the prefill worker of its last turn.
        reserved: blocks promised to it, 0 without reservations.
        last_used: time of its last request's end or beginning, in seconds.
        running: requests in flight.
        parts: by name.
    """

    worker: int
    reserved: int
    last_used: float
    running: int = 0
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def unused(self) -> int:
        """Promised blocks that it does not hold."""
        used = sum(max(part.held, len(part.pinned)) for part in self.parts.values())
        return max(0, self.reserved - used)

    @property
    def pinned_on(self) -> set[int]:
        """Workers on which blocks are held for it."""
        return {part.pinned_on for part in self.parts.values() if part.pinned}


@dataclass(frozen=True)
class Turn:
    """A request of a session, from its admission to its end."""

    key: SessionKey
    session: Session
    part: Part
    worker: int
    held: int


class SessionTable:
    """Sessions by their keys.

    Args:
        reserve_blocks: blocks promised to each session for all its parts together; 0 promises
            nothing and pins nothing. Parts that were promised theirs one by one could wait for each
            other.
        idle_s: seconds without a request after which a session is forgotten.
        release: gives back pinned blocks, called with (worker, blocks).

    Attributes:
        retokenized: turns whose prompt did not go on from the ids that the last turn ended with.
    """

    def __init__(
        self, reserve_blocks: int, idle_s: float, release: Callable[[int, Sequence[int]], None]
    ) -> None:
        self.reserve_blocks = reserve_blocks
        self._idle_s = idle_s
        self._release = release
        self._sessions: dict[SessionKey, Session] = {}
        self.retokenized = 0

    def __len__(self) -> int:
        """Sessions that hold a reservation; may be asked from any thread."""
        # The copy is one step of the interpreter: the engine adds sessions during a plain loop.
        return sum(bool(session.reserved) for session in list(self._sessions.values()))

    def get(self, key: SessionKey | None) -> Session | None:
        """A session that is known."""
        return self._sessions.get(key) if key is not None else None

    def on_worker(self, worker: int) -> Iterator[Session]:
        """Sessions that live on a worker."""
        return (s for s in self._sessions.values() if s.worker == worker)

    def fits(self, key: SessionKey | None, worker: int, capacity: int) -> bool:
        """Whether a session is known on a worker, or can be promised its blocks there."""
        if key is None or not self.reserve_blocks:
            return True
        session = self._sessions.get(key)
        if session is not None and session.worker == worker:
            return True
        promised = sum(s.reserved for s in self.on_worker(worker))
        return promised == 0 or promised + self.reserve_blocks <= capacity

    def unused_blocks(self, worker: int, besides: SessionKey | None) -> int:
        """Blocks promised to other sessions of a worker, and not held by them."""
        own = self.get(besides)
        return sum(s.unused for s in self.on_worker(worker) if s is not own)

    def begin(
        self,
        key: SessionKey | None,
        part: str,
        worker: int,
        held: int,
        ids: Sequence[int],
        now: float,
    ) -> Turn | None:
        """A request with a prompt of these ids was admitted, and holds so many blocks."""
        if key is None:
            return None
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(worker, self.reserve_blocks, now)
        if session.worker != worker:
            self._unpin_all(session)
            session.worker = worker
        mine = session.parts.setdefault(part, Part())
        # The last token may be missing: one that ends a response is often left out of a text.
        known = min(len(mine.ids) - 1, len(ids))
        if common_prefix(mine.ids, ids) < known:
            self.retokenized += 1
        session.running += 1
        mine.held += held
        session.last_used = now
        return Turn(key, session, mine, worker, held)

    def finish(
        self, turn: Turn | None, keep: Sequence[int], ids: tuple[int, ...], now: float
    ) -> bool:
        """A turn has ended; where its session has been ended before, nothing is kept.

        Args:
            keep: its prompt blocks, of which the caller gives one reference away if True is
                returned.
            ids: its prompt and response.

        Returns:
            Whether the session now holds `keep`.
        """
        if turn is None or self.get(turn.key) is not turn.session:
            return False
        session, part = turn.session, turn.part
        session.running -= 1
        session.last_used = now
        part.held -= turn.held
        part.ids = ids
        if not session.reserved or not keep:
            return False
        self._unpin(part)
        part.pinned, part.pinned_on = list(keep), turn.worker
        return True

    @staticmethod
    def abandon(turn: Turn | None) -> None:
        """A turn gave its blocks back without an end, because its worker died."""
        if turn is not None:
            turn.session.running -= 1
            turn.part.held -= turn.held

    def end(self, key: SessionKey | None) -> None:
        """Forget a session and give up what it holds."""
        session = self.get(key)
        if session is not None and key is not None:
            self._unpin_all(session)
            del self._sessions[key]

    def end_named(self, name: str) -> None:
        """Forget the sessions of a name, one for each salt."""
        for key in [key for key in self._sessions if key[1] == name]:
            self.end(key)

    def expire(self, now: float, waiting: Collection[SessionKey | None]) -> None:
        """Forget sessions that have been idle for too long and have no turn that waits."""
        idle = [
            key
            for key, s in self._sessions.items()
            if not s.running and key not in waiting and now - s.last_used > self._idle_s
        ]
        for key in idle:
            self.end(key)

    def give_up_one(self, worker: int) -> bool:
        """Unpin the session of a worker that has been idle longest; False where there is none."""
        sessions = self._sessions.values()
        idle = [s for s in sessions if worker in s.pinned_on and not s.running]
        if not idle:
            return False
        session = min(idle, key=lambda s: s.last_used)
        self._unpin_all(session)
        session.reserved = 0
        return True

    def drop_worker(self, worker: int) -> None:
        """A worker is gone: its sessions keep their names and lose what was pinned."""
        for session in self._sessions.values():
            for part in session.parts.values():
                if part.pinned_on == worker:
                    self._unpin(part)

    def _unpin_all(self, session: Session) -> None:
        for part in session.parts.values():
            self._unpin(part)

    def _unpin(self, part: Part) -> None:
        if part.pinned:
            self._release(part.pinned_on, part.pinned)
            part.pinned = []
