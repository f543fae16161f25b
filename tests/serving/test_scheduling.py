"""Admission, priorities, sessions, routing: decisions seen through what the engine does."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from tests.serving.served import Collector, Oracle, assert_nothing_leaks, engine_of, request, run

from prefillshare_train.serving import lane, workers
from prefillshare_train.serving.api import GenerationRequest
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.router import Candidate, choose_worker


def context(number: int, length: int) -> tuple[int, ...]:
    return tuple(10 + (number * 7 + i) % 190 for i in range(length))


def test_a_prefix_wanted_twice_is_prefilled_once(models: ServedModels) -> None:
    engine = engine_of(models, chunk_tokens=8)
    same = context(0, 41)
    requests = [request(name, same) for name in ("math", "code", "full")]
    run(engine, requests)
    assert engine.stats().prefilled_tokens == 40


@pytest.mark.parametrize("decoder", ["math", "half"])
def test_a_long_prefill_does_not_stall_a_running_response(
    models: ServedModels, oracle: Oracle, decoder: str
) -> None:
    """Of `half`, the decoder runs half of the prompt itself."""
    engine = engine_of(models, 100, chunk_tokens=8)
    found = Collector()
    short, long = (
        request("math", context(1, 5), 40, ignore_eos=True),
        request(decoder, context(2, 120), 2),
    )
    engine.submit(short, found)
    while not found.events.get(short.request_id):
        engine.step()
    engine.submit(long, found)
    tokens_at = []
    while not found.events.get(long.request_id):
        engine.step()
        tokens_at.append(len(found.events[short.request_id]))
    # One token a step, though the prefill takes 17 steps of seven tokens.
    assert len(tokens_at) >= 17
    assert all(b - a == 1 for a, b in itertools.pairwise(tokens_at))
    while not found.done(long.request_id):
        engine.step()
    answer = found.generation(long.request_id).token_ids
    assert list(answer) == oracle.answer(decoder, long.prompt_ids, 2)


def test_the_base_and_the_decoders_share_a_steps_prompt_tokens(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither keeps the other waiting, and together they stay within the budget."""
    steps: list[dict[str, int]] = []

    def counted(name: str, run: Any) -> Any:
        def counting(model: Any, storage: Any, pieces: Any, **options: Any) -> None:
            steps[-1][name] = steps[-1].get(name, 0) + sum(len(piece.ids) for piece in pieces)
            run(model, storage, pieces, **options)

        return counting

    monkeypatch.setattr(workers, "run_pieces", counted("base", workers.run_pieces))
    monkeypatch.setattr(lane, "run_pieces", counted("decoder", lane.run_pieces))
    engine = engine_of(models, 100, chunk_tokens=8)
    found = Collector()
    sent = [request("half", context(1, 80), 2), request("math", context(2, 120), 2)]
    for one in sent:
        engine.submit(one, found)
    while not all(found.done(one.request_id) for one in sent):
        steps.append({})
        engine.step()
    assert max(sum(step.values()) for step in steps) <= 8
    assert any(len(step) == 2 for step in steps)
    total = {name: sum(step.get(name, 0) for step in steps) for name in ("base", "decoder")}
    assert total == {"base": 40 + 119, "decoder": 39}


def test_a_decoders_own_prompt_tokens_are_booked_as_prefill(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pieces = lane.run_pieces

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        run_pieces(*arguments, **options)

    monkeypatch.setattr(lane, "run_pieces", slow)
    engine = engine_of(models, 100)
    run(engine, [request("half", context(1, 20), 2)])
    stats = engine.stats()
    assert stats.prefill_seconds > 0.5 > stats.decode_seconds


def test_little_prefill_goes_before_much_but_not_for_ever(models: ServedModels) -> None:
    def first_done(aging: float) -> str:
        engine = engine_of(models, 100, chunk_tokens=8, max_decode_rows=1, aging_tokens_per_s=aging)
        found = Collector()
        long = request("math", context(1, 100), 1)
        engine.submit(long, found)
        engine.step()
        for number in range(2, 5):
            engine.submit(request("math", context(number, 8), 1), found)
        while not found.events:
            engine.step()
        return "long" if long.request_id in found.events else "short"

    assert first_done(aging=0) == "short"
    assert first_done(aging=1e9) == "long"


def test_prefill_stops_when_decoding_cannot_follow(models: ServedModels) -> None:
    engine = engine_of(models, 400, max_decode_rows=2, prefill_ahead=1, chunk_tokens=64)
    found = Collector()
    for number in range(8):
        engine.submit(request("math", context(number, 9), 30, ignore_eos=True), found)
    for _ in range(6):
        engine.step()
    stats = engine.stats()
    assert stats.prefilling + stats.decoding == 3
    assert stats.waiting == 5


def turn(name: str, session: int, length: int, **options: object) -> object:
    return request(name, context(session, length), 4, session=f"s{session}", **options)


def rounds(models: ServedModels, sessions: int, **options: object) -> list[float]:
    """Share of cached prompt tokens in each round of turns of growing sessions."""
    engine = engine_of(models, blocks=40, session_idle_s=1e9, **options)
    shares = []
    waiting = list(range(sessions))
    for length in (20, 28, 36, 44):
        before = engine.stats()
        requests = [turn("math", s, length, end_session=length == 44) for s in waiting]
        found = Collector()
        for one in requests:
            engine.submit(one, found)
        for _ in range(400):
            engine.step()
        waiting = [s for s, r in zip(waiting, requests, strict=True) if found.done(r.request_id)]
        for one in requests:
            engine.cancel(one.request_id)
        engine.step()
        after = engine.stats()
        shares.append(
            (after.cached_tokens - before.cached_tokens)
            / max(1, after.prompt_tokens - before.prompt_tokens)
        )
    return shares


def test_reserved_sessions_find_their_blocks_where_others_thrash(models: ServedModels) -> None:
    # Six sessions of 12 blocks do not fit into 40: without reservations each turn evicts the
    # next session's blocks before they are asked for.
    thrashing = rounds(models, 6)
    reserved = rounds(models, 6, session_tokens=48)
    assert max(thrashing[2:]) < 0.3
    assert min(reserved[1:]) > 0.6


def test_a_request_that_is_cancelled_in_the_queue_was_never_started(models: ServedModels) -> None:
    engine = engine_of(models, max_decode_rows=1, prefill_ahead=1)
    found = Collector()
    asked = [request("math", context(n, 20), 4) for n in range(3)]
    for one in asked:
        engine.submit(one, found)
    engine.step()
    for one in asked:
        engine.cancel(one.request_id)
    engine.step()
    started = [found.generation(one.request_id).usage.started for one in asked]
    assert started == [True, True, False]
    assert engine.stats().prompt_tokens == 40


def test_a_session_without_a_place_waits_and_gets_the_next_free_one(models: ServedModels) -> None:
    engine = engine_of(models, blocks=30, session_tokens=48, session_idle_s=1e9)
    found = Collector()
    first, second, third = (turn("math", s, 20) for s in range(3))
    for one in (first, second, third):
        engine.submit(one, found)
    for _ in range(200):
        engine.step()
    assert found.done(first.request_id)
    assert found.done(second.request_id)
    assert not found.done(third.request_id)
    assert engine.stats().sessions_waiting == 1
    engine.end_session("s0")
    for _ in range(200):
        engine.step()
    assert found.done(third.request_id)
    for session in ("s1", "s2"):
        engine.end_session(session)
    engine.step()
    assert_nothing_leaks(engine)


def test_sessions_that_wait_are_counted_while_no_row_is_free(models: ServedModels) -> None:
    engine = engine_of(models, 30, session_tokens=48, max_decode_rows=1, prefill_ahead=1)
    found = Collector()
    for session in (0, 1, 2, 2):
        engine.submit(turn("math", session, 20), found)
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.sessions, stats.sessions_waiting) == (2, 2, 1)


def admitted_on(engine: Engine, *asked: GenerationRequest) -> list[int]:
    """Workers that requests are given, none of which runs anything yet; -1 for one that waits."""
    loop = engine._loop
    sequences = [engine._intake.sequence(one, Collector()) for one in asked]
    for seq in sequences:
        loop.enqueue(seq)
        loop.scheduler.admit(time.monotonic())
    return [seq.worker for seq in sequences]


def test_no_prompt_waits_for_a_prefix_on_a_worker_that_it_does_not_go_to(
    models: ServedModels,
) -> None:
    system = context(0, 12)
    engine = engine_of(models, 200, prefill_workers=2)
    first, other = system + context(1, 60), system + context(2, 60)
    asked = [request("math", ids, 2) for ids in (first, other, first, first[:50] + (9,) * 8)]
    # The second shares too little with the first to be drawn to it; the others share most.
    assert admitted_on(engine, *asked) == [0, 1, -1, -1]


def test_an_isolated_session_is_promised_all_its_parts_at_once(models: ServedModels) -> None:
    """One by one, the parts of two sessions could hold half of each and wait for the other."""
    decoders = len(models.decoders)
    options = {"mode": "isolated", "session_tokens": 40, "session_idle_s": 1e9}
    engine = engine_of(models, blocks=10 * decoders + 2, **options)
    found = Collector()
    firsts = [turn("math", session, 20) for session in range(2)]
    for one in firsts:
        engine.submit(one, found)
    for _ in range(100):
        engine.step()
    assert found.done(firsts[0].request_id)
    assert not found.done(firsts[1].request_id)
    run(engine, [turn("code", 0, 20)])
    run(engine, [turn("math", 0, 20, end_session=True)])
    for _ in range(100):
        engine.step()
    assert found.done(firsts[1].request_id), "the last turn ends what every decoder held"
    engine.end_session("s1")
    engine.step()
    assert engine.stats().sessions == 0
    assert_nothing_leaks(engine)


def test_a_full_pool_keeps_nobody_from_another(models: ServedModels) -> None:
    engine = engine_of(models, blocks=42, prefill_workers=2, chunk_tokens=64)
    found = Collector()
    kept = context(5, 41)  # the base runs whole blocks of it
    first = request("math", kept, 1)
    engine.submit(first, found)
    while not found.done(first.request_id):
        engine.step()
        time.sleep(0.001)
    # Both go where their prefix is kept, which has room for one of them.
    large, again = (
        request("math", (*kept[:40], *context(n, 12)), 12, ignore_eos=True) for n in (6, 7)
    )
    other = request("math", context(8, 60), 2)
    for one in (large, again, other):
        engine.submit(one, found)
    engine.step()
    waiting = {seq.request.request_id for seq in engine._loop.scheduler.waiting}
    assert waiting == {again.request_id}


def test_idle_sessions_lose_their_place(models: ServedModels) -> None:
    engine = engine_of(models, blocks=30, session_tokens=100, session_idle_s=0.0)
    run(engine, [turn("math", 0, 20), turn("math", 1, 20)])
    engine.step()
    assert engine.stats().sessions == 0
    assert_nothing_leaks(engine)


def test_a_session_that_outgrows_its_promise_still_goes_on(models: ServedModels) -> None:
    engine = engine_of(models, blocks=30, session_tokens=40, session_idle_s=1e9)
    for length in (20, 60, 100):
        for session in range(2):
            run(engine, [turn("math", session, length)])


def test_text_that_came_back_as_other_tokens_is_counted(models: ServedModels) -> None:
    engine = engine_of(models)
    first = turn("math", 0, 20)
    answer = run(engine, [first]).generation(first.request_id)
    good = request("math", (*first.prompt_ids, *answer.token_ids, 7, 8), session="s0")
    run(engine, [good])
    assert engine.stats().retokenized_misses == 0
    other = request("math", (*good.prompt_ids[:22], 199, 198, 197), session="s0")
    run(engine, [other])
    assert engine.stats().retokenized_misses == 1


def test_routes_by_prefix_then_session_then_load() -> None:
    assert choose_worker([Candidate(0, 90, 500), Candidate(1, 60, 0)], 100, affinity=1) == 0
    assert choose_worker([Candidate(0, 60, 500), Candidate(1, 60, 0)], 100, affinity=0) == 0
    assert choose_worker([Candidate(0, 60, 500), Candidate(1, 60, 0)], 100, affinity=None) == 1
    # A system prompt that only worker 0 has run does not draw all sessions there.
    assert choose_worker([Candidate(0, 20, 500), Candidate(1, 0, 0)], 100, affinity=None) == 1


def test_a_sink_that_fails_ends_its_own_request_alone(models: ServedModels) -> None:
    engine = engine_of(models)

    def broken(event: object) -> None:
        raise OSError("the client is gone")

    bad, good = request("math", context(1, 9), 50, ignore_eos=True), request("code", context(2, 9))
    engine.submit(bad, broken)
    run(engine, [good])
    for _ in range(3):
        engine.step()
    assert engine.stats().finished["cancelled"] == 1
    assert_nothing_leaks(engine)


def test_draining_finishes_what_runs_and_takes_no_more(models: ServedModels) -> None:
    from prefillshare_train.serving.api import EngineStoppedError

    with engine_of(models) as engine:
        found = Collector()
        one = request("math", context(1, 9), 12, ignore_eos=True)
        engine.submit(one, found)
        assert engine.drain(30)
        assert len(found.generation(one.request_id).token_ids) == 12
        try:
            engine.submit(request("math", context(1, 9)), found)
        except EngineStoppedError:
            return
        raise AssertionError("a draining engine took a request")
