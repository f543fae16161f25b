"""How fast requests end, for those that are told to come back later."""

from __future__ import annotations

import time
from collections import deque

_WINDOW = 64


class EndRate:
    """The rate at which requests ended of late; noted in one thread, read in any."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    def note(self) -> None:
        """A request has ended."""
        self._ends.append(time.monotonic())

    def seconds_to_the_next(self) -> float:
        """Seconds until another is likely to end, in [1, 60]."""
        if len(self._ends) < 2:
            return 1.0
        span = self._ends[-1] - self._ends[0]
        return min(60.0, max(1.0, span / (len(self._ends) - 1)))
