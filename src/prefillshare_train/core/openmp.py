"""OpenMP's worker threads, where several threads of a process run torch operations in turns."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_PAUSE_SOFT = 1


def release_workers() -> None:
    """End the calling thread's idle OpenMP workers; its next parallel operation makes new ones.

    Every thread that runs a parallel operation gets workers of its own and keeps them. Once a
    process has more of them than the machine has cores, GNU's runtime, which torch brings, lets
    all of them sleep where they would spin: every short operation then waits for them to wake up,
    also where the threads only take turns. A thread that hands its work to another calls
    this first. Does nothing where the runtime has no `omp_pause_resource_all` (OpenMP 5.0).
    """
    pause = _pause()
    if pause is not None:
        pause(_PAUSE_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    try:
        # torch loads its runtime for the whole process to see.
        found: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # another runtime, or not a POSIX system
        return None
    return found
