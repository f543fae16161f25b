"""Agent sessions: which worker they live on, and the blocks kept for their next turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from prefillshare_train.serving.prefix_cache import common_prefix


@dataclass(eq=False)
class Session:
    """One agent session.

    Attributes:
        worker: the prefill worker of its last turn.
        reserved: blocks promised to it, 0 without reservations.
        pinned: prompt blocks of its last turn, held for the next; `pinned_on`: their worker, which
            may be another than `worker` where two of its turns ran at once.
        running: requests in flight; `held`: blocks that these hold.
        last_used: time of its last request's end or beginning, in seconds.
        ids: prompt and response of its last turn.
    """

    worker: int
    reserved: int
    last_used: float
    pinned: list[int] = field(default_factory=list)
    pinned_on: int = -1
    running: int = 0
    held: int = 0
    ids: tuple[int, ...] = ()

    @property
    def unused(self) -> int:
        """Promised blocks that it does not hold."""
        return max(0, self.reserved - max(self.held, len(self.pinned)))


class SessionTable:
    """Sessions by name.

    Args:
        reserve_blocks: blocks promised to each session; 0 promises nothing and pins nothing.
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
        self._sessions: dict[str, Session] = {}
        self.retokenized = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str | None) -> Session | None:
        """A session that is known."""
        return self._sessions.get(name) if name is not None else None

    def on_worker(self, worker: int) -> Iterator[Session]:
        """Sessions that live on a worker."""
        return (s for s in self._sessions.values() if s.worker == worker)

    def fits(self, name: str | None, worker: int, capacity: int) -> bool:
        """Whether a session is known on a worker, or can be promised its blocks there."""
        if name is None or not self.reserve_blocks:
            return True
        session = self._sessions.get(name)
        if session is not None and session.worker == worker:
            return True
        promised = sum(s.reserved for s in self.on_worker(worker))
        return promised == 0 or promised + self.reserve_blocks <= capacity

    def unused_blocks(self, worker: int, besides: str | None) -> int:
        """Blocks promised to other sessions of a worker, and not held by them."""
        own = self.get(besides)
        return sum(s.unused for s in self.on_worker(worker) if s is not own)

    def begin(
        self, name: str | None, worker: int, held: int, prompt: Sequence[int], now: float
    ) -> Session | None:
        """A turn was admitted, and holds so many blocks; returns its session."""
        if name is None:
            return None
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(worker, self.reserve_blocks, now)
        if session.worker != worker:
            self._unpin(session)
            session.worker = worker
        # The last token may be missing: one that ends a response is often left out of a text.
        known = min(len(session.ids) - 1, len(prompt))
        if common_prefix(session.ids, prompt) < known:
            self.retokenized += 1
        session.running += 1
        session.held += held
        session.last_used = now
        return session

    def finish(
        self,
        name: str | None,
        session: Session | None,
        worker: int,
        held: int,
        keep: Sequence[int],
        ids: tuple[int, ...],
        now: float,
    ) -> bool:
        """A turn has ended.

        Args:
            session: as `begin` gave it; where it has been ended since, nothing is kept.
            worker: that ran it.
            keep: its prompt blocks, of which the caller gives one reference away if True is
                returned.

        Returns:
            Whether the session now holds `keep`.
        """
        if session is None or self.get(name) is not session:
            return False
        session.running -= 1
        session.held -= held
        session.last_used = now
        session.ids = ids
        if not session.reserved or not keep:
            return False
        self._unpin(session)
        session.pinned, session.pinned_on = list(keep), worker
        return True

    def abandon(self, session: Session | None, held: int) -> None:
        """A turn gave its blocks back without an end, because its worker died."""
        if session is not None:
            session.running -= 1
            session.held -= held

    def end(self, name: str | None) -> None:
        """Forget a session and give up what it holds."""
        session = self.get(name)
        if session is not None and name is not None:
            self._unpin(session)
            del self._sessions[name]

    def expire(self, now: float, waiting: Collection[str | None]) -> None:
        """Forget sessions that have been idle for too long and have no turn that waits."""
        idle = [
            name
            for name, s in self._sessions.items()
            if not s.running and name not in waiting and now - s.last_used > self._idle_s
        ]
        for name in idle:
            self.end(name)

    def give_up_one(self, worker: int) -> bool:
        """Unpin the session of a worker that has been idle longest; False where there is none."""
        sessions = self._sessions.values()
        idle = [s for s in sessions if s.pinned and s.pinned_on == worker and not s.running]
        if not idle:
            return False
        session = min(idle, key=lambda s: s.last_used)
        self._unpin(session)
        session.reserved = 0
        return True

    def drop_worker(self, worker: int) -> None:
        """A worker is gone: its sessions keep their names and lose what was pinned."""
        for session in self._sessions.values():
            if session.pinned_on == worker:
                self._unpin(session)

    def _unpin(self, session: Session) -> None:
        if session.pinned:
            self._release(session.pinned_on, session.pinned)
            session.pinned = []
