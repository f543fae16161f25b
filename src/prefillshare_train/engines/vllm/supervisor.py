"""Start processes together, keep them up, and leave none behind.

The policy: while they start, the first that fails stops all. Once everything is up, a process that
ends is started again, a few times within a time; one that keeps ending stops all, with its last
lines. The router sees what is missing by its own health checks and goes on with the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefillshare_train.engines.vllm.errors import VllmError

_POLL_S = 0.25
_PROGRESS_S = 10
Tell = Callable[[str], None]


class Process(Protocol):
    """A process with a log that can be started again after it has ended."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def log(self) -> Path:
        """The file that holds its output."""

    def start(self) -> None:
        """Start it; returns at once."""

    def is_ready(self) -> bool:
        """Whether it takes requests."""

    def exit_code(self) -> int | None:
        """None before it was started and while it runs."""

    def stop(self) -> None:
        """Ask it to end, then make it; returns when it and its children have ended."""

    def last_lines(self) -> str:
        """The end of its log."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often a process that was ready may be started again.

    Attributes:
        times: within `window_s`; 0 stops everything the first time.
        window_s: after so long a restart no longer counts.
    """

    times: int = 3
    window_s: float = 600.0


class Supervisor:
    """Processes in stages: a stage starts when the one before is ready.

    They are stopped in the opposite order, so that the router drains before its instances go.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Process]],
        *,
        tell: Tell,
        stopping: threading.Event,
        ready_timeout_s: float,
        restarts: RestartPolicy,
    ) -> None:
        self._stages = stages
        self._tell = tell
        self._stopping = stopping
        self._ready_timeout_s = ready_timeout_s
        self._restarts = restarts
        self._started_again: dict[str, deque[float]] = {}
        self._not_ready_since: dict[str, float] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All of them, ready, for the length of a block; none afterwards.

        A request to stop while they start ends the start, and the block is entered all the same.

        Raises:
            VllmError: one ended or was not ready in time, with its last lines.
        """
        try:
            for stage in self._stages:
                self._start(stage)
            yield
        finally:
            self._stop_all()

    def watch(self) -> None:
        """Keep them up until asked to stop.

        One that was started again and is not ready in time counts as ended.

        Raises:
            VllmError: one has ended more often than the policy allows, with its last lines.
        """
        while not self._stopping.wait(_POLL_S):
            for process in self._all():
                code = process.exit_code()
                if code is not None:
                    self._start_again(process, _how(code))
                elif process.name in self._not_ready_since:
                    self._check_ready(process)

    def _start(self, stage: Sequence[Process]) -> None:
        began = told = time.monotonic()
        waiting = list(stage)
        if self._stopping.is_set():
            return
        for process in waiting:
            process.start()
            self._tell(f"{process.name}: starting, log in {process.log}")
        while waiting and not self._stopping.wait(_POLL_S):
            for started in self._all():
                code = started.exit_code()
                if code is not None:
                    raise _ended(started, _how(code), "as the deployment started")
            now = time.monotonic()
            for process in [p for p in waiting if p.is_ready()]:
                waiting.remove(process)
                self._tell(f"{process.name}: ready after {now - began:.0f} s")
            if waiting and now - began > self._ready_timeout_s:
                late = waiting[0]
                raise VllmError(
                    f"{late.name} was not ready after {self._ready_timeout_s:g} s; see "
                    f"{late.log}, or give --ready-timeout-s more. Its last lines:\n"
                    + late.last_lines()
                )
            if waiting and now - told > _PROGRESS_S:
                told = now
                names = ", ".join(process.name for process in waiting)
                self._tell(f"waiting for {names} ({now - began:.0f} s)")

    def _check_ready(self, process: Process) -> None:
        waited = time.monotonic() - self._not_ready_since[process.name]
        if process.is_ready():
            del self._not_ready_since[process.name]
            self._tell(f"{process.name}: ready again after {waited:.0f} s")
        elif waited > self._ready_timeout_s:
            self._start_again(process, f"was not ready after {self._ready_timeout_s:g} s")

    def _start_again(self, process: Process, how: str) -> None:
        times = self._started_again.setdefault(process.name, deque())
        now = time.monotonic()
        while times and now - times[0] > self._restarts.window_s:
            times.popleft()
        if len(times) >= self._restarts.times:
            raise _ended(process, how, f"after {len(times)} restarts")
        times.append(now)
        self._tell(
            f"{process.name}: {how}, starting it again "
            f"({len(times)} of {self._restarts.times}); its last lines:\n{process.last_lines()}"
        )
        process.stop()  # what it left of its children
        process.start()
        self._not_ready_since[process.name] = time.monotonic()

    def _stop_all(self) -> None:
        with contextlib.ExitStack() as last_first:  # goes on where one cannot be stopped
            for stage in self._stages:
                last_first.callback(_stop_together, stage)

    def _all(self) -> Iterator[Process]:
        for stage in self._stages:
            yield from stage


def _stop_together(stage: Sequence[Process]) -> None:
    with ThreadPoolExecutor(max(1, len(stage))) as pool:
        list(pool.map(lambda process: process.stop(), stage))


def _how(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"


def _ended(process: Process, how: str, when: str) -> VllmError:
    return VllmError(
        f"{process.name} {how} {when}; everything else was stopped. The end of {process.log}:\n"
        + process.last_lines()
    )
