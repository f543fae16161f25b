"""The load driver: order, caps, arrivals, retries and failures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.workloads.fakes import FakeEngine, plan

from prefillshare_train.workloads.client import InProcessClient
from prefillshare_train.workloads.driver import DriverOptions, LoadResult, drive
from prefillshare_train.workloads.sessions import Session


def run(
    engine: FakeEngine, sessions: Sequence[Session], cap: int = 4, **options: Any
) -> LoadResult:
    return asyncio.run(drive(InProcessClient(engine), sessions, DriverOptions(cap, **options)))


def test_a_session_is_a_closed_loop_over_its_scripted_prompts() -> None:
    engine = FakeEngine(first_s=0.002)
    sessions = plan().sessions(3)
    result = run(engine, sessions)
    assert not any(request.error for request in result.requests)
    assert len(result.requests) == len(result.sent) == 18
    for session in sessions:
        mine = [r for r in engine.requests if r.session == session.name]
        assert [r.prompt_ids for r in mine] == session.prompts()
        assert [r.decoder for r in mine] == [turn.decoder for turn in session.turns]
        assert [r.end_session for r in mine] == [False] * 5 + [True]
        records = [r for r in result.requests if r.session == session.name]
        for before, after in itertools.pairwise(records):
            assert after.start_s >= before.start_s + before.total_s
    assert {s.turns for s in result.sessions} == {6}


def test_a_generated_context_holds_what_was_answered() -> None:
    engine = FakeEngine()
    [session] = plan().sessions(1)
    run(engine, [session], fixed_context=False)
    second = engine.requests[1].prompt_ids
    first = session.prompts()[0]
    assert second[: len(first) + 5] == (*first, 200, 201, 202, 203, 204)


@pytest.mark.parametrize("cap", [1, 3])
def test_no_more_sessions_run_than_the_cap_and_they_come_in_order(cap: int) -> None:
    engine = FakeEngine(first_s=0.005)
    sessions = plan("uniform", calls=2, response_tokens=1).sessions(8)
    result = run(engine, sessions, cap)
    assert engine.most_running == cap
    starts = sorted(result.sessions, key=lambda s: s.start_s)
    assert [s.name for s in starts] == [s.name for s in sessions]
    assert all(s.end_s > s.start_s >= s.at_s == 0 for s in result.sessions)


def test_sessions_wait_for_their_arrivals() -> None:
    sessions = [
        replace(session, at_s=0.1 * number)
        for number, session in enumerate(plan("uniform", calls=1).sessions(3))
    ]
    result = run(FakeEngine(), sessions)
    starts = sorted(r.start_s for r in result.requests)
    assert all(start >= 0.1 * number for number, start in enumerate(starts))
    assert result.duration_s >= 0.2


def test_the_clock_starts_with_the_first_arrival() -> None:
    [session] = plan("uniform", calls=1).sessions(1)
    result = run(FakeEngine(), [replace(session, at_s=50.0)])
    assert result.duration_s < 10
    assert 50 <= result.sessions[0].start_s < 60


def test_replayed_turns_do_not_begin_before_their_time() -> None:
    [session] = plan("uniform", calls=2).sessions(1)
    late = replace(session.turns[1], not_before_s=0.15)
    result = run(FakeEngine(), [replace(session, turns=(session.turns[0], late))])
    assert result.requests[1].start_s >= 0.15


def test_refused_calls_are_sent_again_and_the_wait_is_latency() -> None:
    [session] = plan("uniform", calls=1).sessions(1)
    result = run(FakeEngine(refuse=3), [session])
    [request] = result.requests
    assert request.error is None
    assert request.retries == 3
    assert request.ttft_s is not None
    assert 0.03 <= request.ttft_s <= request.total_s
    given_up = run(FakeEngine(refuse=9), [session], max_retries=2)
    [request] = given_up.requests
    assert request.error is not None
    assert "1 requests are waiting" in request.error
    assert request.retries == 3


def test_a_failed_call_ends_its_session_alone() -> None:
    engine = FakeEngine(fail="c")
    calls: list[None] = []
    sessions = plan().sessions(2)
    result = asyncio.run(
        drive(
            InProcessClient(engine), sessions, DriverOptions(2), on_call=lambda: calls.append(None)
        )
    )
    assert [s.turns for s in result.sessions] == [2, 2]
    assert {s.error for s in result.sessions} == {"it broke"}
    assert sorted(engine.ended_sessions) == sorted(s.name for s in sessions)
    # The bar reaches its end all the same.
    assert len(calls) == sum(len(s.turns) for s in sessions)


def test_silence_is_given_up_and_cancelled() -> None:
    engine = FakeEngine(silent="a")
    [session] = plan().sessions(1)
    result = run(engine, [session], timeout_s=0.05)
    [request] = result.requests
    assert request.error == "no whole response within 0.05 s"
    assert request.total_s >= 0.05
    assert len(engine.cancelled) == 1
