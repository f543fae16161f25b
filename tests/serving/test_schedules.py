"""Random schedules: whatever is batched, evicted, staged, cancelled or lost, answers stay right."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.served import (
    DECODERS,
    Collector,
    Oracle,
    assert_nothing_leaks,
    engine_of,
    request,
)

from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.workers import PrefillReport

# Prompts are made of these pieces, so that they share prefixes of every length.
PIECES = tuple(
    tuple(range(start, start + length))
    for start, length in [(10, 3), (20, 4), (30, 5), (40, 9), (60, 1), (10, 8)]
)

turns = st.fixed_dictionaries(
    {
        "decoder": st.sampled_from([*DECODERS, "base"]),
        "pieces": st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=5),
        "max_tokens": st.integers(1, 7),
        "session": st.sampled_from([None, "a", "b", "c"]),
        "salt": st.sampled_from([None, "tenant"]),
        "after": st.integers(0, 4),
        "cancel_after": st.sampled_from([None, None, None, 1, 3]),
        "goes_on": st.booleans(),
        "end_session": st.booleans(),
        "lose_worker": st.sampled_from([None, None, None, 0, 1, 2]),
    }
)
engines = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([16, 24, 80]),
        "block_tokens": st.sampled_from([1, 4, 8]),
        "chunk_tokens": st.sampled_from([5, 8, 64]),
        "max_decode_rows": st.integers(1, 4),
        "prefill_ahead": st.integers(1, 3),
        "session_tokens": st.sampled_from([0, 16]),
        "staging_bytes": st.sampled_from([0, 4096, 1 << 20]),
        "mode": st.sampled_from(["shared", "shared", "isolated"]),
        "prefill_workers": st.sampled_from([1, 1, 2, 3]),
    }
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(options=engines, plan=st.lists(turns, min_size=1, max_size=12))
def test_every_answer_is_what_core_generate_gives(
    models: ServedModels, oracle: Oracle, options: dict[str, Any], plan: list[dict[str, Any]]
) -> None:
    options = dict(options)
    workers = options["prefill_workers"]
    blocks = workers * options.pop("blocks")
    if options["block_tokens"] == 1:
        blocks *= 4
    engine = engine_of(models, blocks, session_idle_s=1e9, **options)
    found, sent, contexts = Collector(), [], {}
    lost: set[int] = set()
    for turn in plan:
        ids = tuple(i for piece in turn["pieces"] for i in PIECES[piece])
        if turn["goes_on"]:
            ids = (*contexts.get(turn["session"], ()), *ids)[:40]
        if len(ids) <= 3:
            ids = (*ids, 5, 6, 7)
        one = request(
            turn["decoder"],
            ids,
            turn["max_tokens"],
            session=turn["session"],
            end_session=turn["end_session"],
            cache_salt=turn["salt"],
        )
        engine.submit(one, found)
        sent.append((one, turn["cancel_after"] is not None))
        contexts[turn["session"]] = (*ids, *range(90, 90 + turn["max_tokens"]))
        for _ in range(turn["after"]):
            engine.step()
        if turn["cancel_after"] is not None:
            for _ in range(turn["cancel_after"]):
                engine.step()
            engine.cancel(one.request_id)
        if turn["lose_worker"] is not None:
            lost.add(turn["lose_worker"])
            if lost >= set(range(workers)):  # the last one stays
                lost.remove(turn["lose_worker"])
            elif turn["lose_worker"] < workers:
                killed = PrefillReport(turn["lose_worker"], 0.0, "killed by the test", lost=True)
                engine._loop.receive(killed)
    deadline = time.monotonic() + 20
    while not all(found.done(one.request_id) for one, _ in sent):
        assert time.monotonic() < deadline, engine.stats()
        if engine.step():
            continue
        time.sleep(0.001)  # workers run in threads
        if engine.stats().sessions_waiting:  # for others that hold all there is, and are idle
            for session in ("a", "b", "c"):
                engine.end_session(session)
    assert engine.stats().workers_alive == len(set(range(workers)) - lost)
    for one, cancelled in sent:
        answer = found.generation(one.request_id)
        expected = oracle.answer(one.decoder, one.prompt_ids, one.sampling.max_tokens)
        if answer.finish_reason == "cancelled":
            assert cancelled
            assert list(answer.token_ids) == expected[: len(answer.token_ids)]
        else:
            assert list(answer.token_ids) == expected
        assert answer.usage.cached_tokens + answer.usage.prefilled_tokens <= len(one.prompt_ids)
    for session in ("a", "b", "c"):
        engine.end_session(session)
    engine.step()
    assert_nothing_leaks(engine)
    engine.stop()


def test_a_worker_that_dies_loses_no_answer(models: ServedModels, oracle: Oracle) -> None:
    """Three workers; one is lost while it prefills, one while it is idle."""
    with engine_of(models, 240, prefill_workers=3, chunk_tokens=8) as engine:
        found = Collector()
        sent = [
            request(name, tuple(range(10 + n, 40 + n)), 6, session=f"s{n}")
            for n, name in enumerate([*DECODERS, *DECODERS])
        ]
        for n, one in enumerate(sent):
            engine.submit(one, found)
            if n in (2, 7):
                engine._loop.receive(PrefillReport(n % 3, 0.0, "killed by the test", lost=True))
        assert engine.drain(60)
        stats = engine.stats()
    assert stats.workers_alive == 1
    for one in sent:
        expected = oracle.answer(one.decoder, one.prompt_ids, 6)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_without_any_worker_requests_end_with_an_error(models: ServedModels) -> None:
    engine = engine_of(models)
    found = Collector()
    one = request("math", range(10, 40))
    engine.submit(one, found)
    engine._loop.receive(PrefillReport(0, 0.0, "killed by the test", lost=True))
    engine.step()
    answer = found.generation(one.request_id)
    assert (answer.finish_reason, answer.error) == ("error", "no prefill worker is left")


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_in_threads_answer_alike(
    models: ServedModels, oracle: Oracle, workers: int
) -> None:
    sent = [request([*DECODERS][n % 6], tuple(range(10 + n % 4, 40 + n % 4)), 6) for n in range(18)]
    with engine_of(models, 300, prefill_workers=workers) as engine:
        found = Collector()
        for one in sent:
            engine.submit(one, found)
        assert engine.drain(60)
        stats = engine.stats()
    assert stats.workers_alive == workers
    for one in sent:
        expected = oracle.answer(one.decoder, one.prompt_ids, 6)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_turns_of_one_session_on_two_workers_at_once(models: ServedModels) -> None:
    """Each worker's blocks go back to itself, whichever turn ended last."""
    options = {"prefill_workers": 2, "session_tokens": 40, "session_idle_s": 1e9}
    with engine_of(models, 160, **options) as engine:
        found = Collector()
        for round_ in range(6):
            for n in range(4):
                ids = tuple(range(10 + 30 * n, 40 + 30 * n + round_))
                engine.submit(request("math", ids, 4, session="s"), found)
        assert engine.drain(60)
        engine.end_session("s")
    assert all(events[-1].finish_reason != "error" for events in found.events.values())
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_step_that_fails_the_engine_serves_on(
    models: ServedModels, oracle: Oracle, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = models.decoders["full"].lane
    step = lane.step
    faults = [RuntimeError("out of something")]

    def fails_once(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return step(*args)

    with engine_of(models, 160, prefill_workers=workers) as engine:
        found = Collector()
        sent = [request("math", range(10, 40), 60, ignore_eos=True, session="s")]
        engine.submit(sent[0], found)
        while not found.events:
            time.sleep(0.01)
        monkeypatch.setattr(lane, "step", fails_once)
        sent.append(request("full", range(50, 90), 6))
        engine.submit(sent[1], found)
        while not all(found.done(one.request_id) for one in sent):
            time.sleep(0.01)
        for one in sent:
            answer = found.generation(one.request_id)
            assert (answer.finish_reason, answer.error) == (
                "error",
                "the engine failed in a step; see its log",
            )
        for name in ("full", "math"):
            again = request(name, range(50, 90), 6)
            expected = oracle.answer(name, again.prompt_ids, 6)
            assert list(engine.generate(again).token_ids) == expected
    assert_nothing_leaks(engine)
