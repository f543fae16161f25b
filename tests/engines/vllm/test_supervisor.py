"""Processes start in stages, are started again a few times, and all end together."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.supervisor import RestartPolicy, Supervisor


class Fake:
    """A process of which a test says when it ends."""

    def __init__(self, name: str, events: list[str], *, ready: bool = True, dies: int = 0) -> None:
        self.name, self.log = name, Path(f"{name}.log")
        self._events, self._ready, self._dies = events, ready, dies
        self._code: int | None = None
        self.fails_to_stop = False

    def start(self) -> None:
        self._events.append(f"start {self.name}")
        self._code = None

    def is_ready(self) -> bool:
        return self._ready

    def become(self, *, ready: bool) -> None:
        self._ready = ready

    def exit_code(self) -> int | None:
        return self._code

    def end(self, code: int) -> None:
        self._code = code

    def stop(self) -> None:
        self._events.append(f"stop {self.name}")
        if self.fails_to_stop:
            raise OSError("no")

    def last_lines(self) -> str:
        return f"the end of {self.name}"


def supervised(
    *stages: list[Fake], told: list[str] | None = None, times: int = 1, ready_timeout_s: float = 5
) -> tuple[Supervisor, threading.Event]:
    stopping = threading.Event()
    supervisor = Supervisor(
        stages,
        tell=(told if told is not None else []).append,
        stopping=stopping,
        ready_timeout_s=ready_timeout_s,
        restarts=RestartPolicy(times=times, window_s=60),
    )
    return supervisor, stopping


def test_a_stage_waits_for_the_one_before_and_ends_before_it() -> None:
    events: list[str] = []
    a, b, router = (Fake(name, events) for name in ("a", "b", "router"))
    supervisor, stopping = supervised([a, b], [router])
    with supervisor.running():
        assert events == ["start a", "start b", "start router"]
        stopping.set()
        supervisor.watch()
    assert events[3] == "stop router"
    assert sorted(events[4:]) == ["stop a", "stop b"]


def test_one_that_ends_as_it_starts_stops_all_and_shows_its_last_lines() -> None:
    events: list[str] = []
    a, b, router = Fake("a", events), Fake("b", events, ready=False), Fake("router", events)
    b.start = lambda: b.end(-9)  # type: ignore[method-assign]
    supervisor, _ = supervised([a, b], [router])
    with (
        pytest.raises(VllmError, match=r"(?s)b was ended by signal 9 .*b\.log.*the end of b"),
        supervisor.running(),
    ):
        pass
    assert "start router" not in events
    assert {"stop a", "stop b"} <= set(events)


def test_one_that_is_not_ready_in_time_is_named() -> None:
    slow = Fake("slow", [], ready=False)
    supervisor, _ = supervised([slow], ready_timeout_s=0.3)
    with pytest.raises(VllmError, match=r"slow was not ready after 0\.3 s"), supervisor.running():
        pass


def test_one_that_ends_later_is_started_again_and_the_next_time_stops_all() -> None:
    events: list[str] = []
    told: list[str] = []
    a, b = Fake("a", events), Fake("b", events)
    supervisor, _ = supervised([a, b], told=told)

    def ends_whenever_it_starts() -> None:
        events.append("start b")
        b.end(3)

    def ends_again_and_again() -> None:
        with supervisor.running():
            b.start = ends_whenever_it_starts  # type: ignore[method-assign]
            b.end(3)
            supervisor.watch()

    with pytest.raises(VllmError, match=r"(?s)b ended with status 3 after 1 restarts.*end of b"):
        ends_again_and_again()
    assert events.count("start b") == 2
    assert events.count("start a") == 1, "the others go on meanwhile"
    assert any("starting it again (1 of 1)" in line and "the end of b" in line for line in told)
    assert events[-2:] in (["stop a", "stop b"], ["stop b", "stop a"])


def test_one_that_is_started_again_and_never_ready_counts_as_ended() -> None:
    events: list[str] = []
    told: list[str] = []
    a, b = Fake("a", events), Fake("b", events)
    supervisor, _ = supervised([a, b], told=told, times=2, ready_timeout_s=0.3)

    def hangs_from_then_on() -> None:
        with supervisor.running():
            b.become(ready=False)
            b.end(3)
            supervisor.watch()

    told_all = r"(?s)b was not ready after 0\.3 s after 2 restarts.*end of b"
    with pytest.raises(VllmError, match=told_all):
        hangs_from_then_on()
    assert events.count("start b") == 3
    assert events.count("start a") == 1
    assert any("was not ready after 0.3 s, starting it again (2 of 2)" in line for line in told)


def test_one_that_is_ready_again_is_told_and_left_alone() -> None:
    events: list[str] = []
    told: list[str] = []
    a = Fake("a", events)
    supervisor, stopping = supervised([a], told=told, ready_timeout_s=0.3)
    with supervisor.running():
        a.end(3)
        threading.Timer(1.0, stopping.set).start()
        supervisor.watch()
    assert events.count("start a") == 2
    assert any("a: ready again" in line for line in told)


def test_a_request_to_stop_while_they_start_is_heard() -> None:
    events: list[str] = []
    slow, router = Fake("slow", events, ready=False), Fake("router", events)
    supervisor, stopping = supervised([slow], [router], ready_timeout_s=60)
    threading.Timer(0.2, stopping.set).start()
    with supervisor.running():
        supervisor.watch()
    assert events == ["start slow", "stop router", "stop slow"]


def test_one_that_cannot_be_stopped_does_not_keep_the_others_up() -> None:
    events: list[str] = []
    a, router = Fake("a", events), Fake("router", events)
    router.fails_to_stop = True
    supervisor, _ = supervised([a], [router])
    with pytest.raises(OSError, match="no"), supervisor.running():
        pass
    assert events[-1] == "stop a"
