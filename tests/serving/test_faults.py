"""What goes wrong for one request, worker or caller stays there."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from tests.serving.served import (
    Collector,
    Oracle,
    assert_nothing_leaks,
    engine_of,
    request,
    run,
)

from prefillshare_train.serving import workers
from prefillshare_train.serving.api import EngineStoppedError, ServingError
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.workers import PrefillReport


def wait_for(found: Collector, *requests: Any) -> None:
    deadline = time.monotonic() + 60
    while not all(found.done(one.request_id) for one in requests):
        assert time.monotonic() < deadline, "a request was never answered"
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_a_prompt_that_cannot_be_prefilled_ends_alone(
    models: ServedModels, oracle: Oracle, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workers.run_pieces

    def fails_on_poison(model: Any, storage: Any, pieces: Any, **options: Any) -> None:
        if any(99 in piece.ids for piece in pieces):
            raise RuntimeError("out of memory")
        real(model, storage, pieces, **options)

    monkeypatch.setattr(workers, "run_pieces", fails_on_poison)
    with engine_of(models, 120, prefill_workers=count) as engine:
        found = Collector()
        poison = request("math", (5, 6, 99, 7, 8, 9), 4)
        engine.submit(poison, found)
        wait_for(found, poison)
        answer = found.generation(poison.request_id)
        assert answer.finish_reason == "error"
        assert answer.error == "the prefill failed: RuntimeError: out of memory"
        good = request("math", range(10, 40), 4)
        assert list(engine.generate(good).token_ids) == oracle.answer("math", good.prompt_ids, 4)
        assert engine.stats().workers_alive == count
    assert_nothing_leaks(engine)


def test_a_batch_that_never_began_is_not_waited_for(
    models: ServedModels, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(models) as engine:
        found, one = Collector(), request("math", range(10, 40), 4)
        worker = engine._loop.workers[0]
        with monkeypatch.context() as broken:
            broken.setattr(worker, "start", lambda pieces: 1 / 0)
            engine.submit(one, found)
            wait_for(found, one)
        assert found.generation(one.request_id).finish_reason == "error"
        again = request("math", range(10, 40), 4)
        expected = oracle.answer("math", again.prompt_ids, 4)
        assert list(engine.generate(again).token_ids) == expected


def test_a_row_that_cannot_be_picked_ends_alone(
    models: ServedModels, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(models)
    bad, good = request("math", range(10, 30), 8, temperature=1.0), request("math", range(11, 30))
    found = Collector()
    engine.submit(bad, found)
    engine.submit(good, found)
    engine.step()
    (picker,) = [s.picker for s in engine._loop.scheduler.prefilling if s.request is bad]
    monkeypatch.setattr(picker, "pick", lambda *_: 1 / 0)
    for _ in range(60):
        engine.step()
    assert found.generation(bad.request_id).finish_reason == "error"
    expected = oracle.answer("math", good.prompt_ids, 8)
    assert list(found.generation(good.request_id).token_ids) == expected
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("second", [range(10, 32), [*range(10, 31), 77]])
def test_a_request_that_just_fits_is_served_again(
    models: ServedModels, oracle: Oracle, second: Any
) -> None:
    engine = engine_of(models, blocks=8)
    for ids in (range(10, 32), second):
        one = request("math", ids, 8)  # 21 and 8 tokens: 6 and 2 blocks of 4
        answer = run(engine, [one], limit=200).generation(one.request_id)
        assert list(answer.token_ids) == oracle.answer("math", tuple(ids), 8)


def test_a_request_that_comes_as_the_last_worker_goes_is_told(models: ServedModels) -> None:
    engine = engine_of(models)
    found = Collector()
    one = request("math", range(10, 20))
    # The loss is known of only in the next step: the request is accepted, and queued after it.
    engine._loop.receive(PrefillReport(0, 0.0, "killed by the test", lost=True))
    engine.submit(one, found)
    engine.step()
    assert found.generation(one.request_id).error == "no prefill worker is left"
    with pytest.raises(EngineStoppedError, match="no prefill worker is left"):
        engine.submit(request("math", range(10, 20)), found)


def test_a_session_can_be_ended_after_the_engine_started_over(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(models, session_tokens=40, session_idle_s=1e9)
    ended = []
    engine.end_session("s")  # queued, and made only after the books have been replaced
    engine._loop.start_over(lambda: None)
    monkeypatch.setattr(engine._loop.sessions, "end_named", ended.append)
    engine.step()
    assert ended == ["s"]


def test_a_cancel_that_comes_at_once_harms_nobody(models: ServedModels, oracle: Oracle) -> None:
    with engine_of(models, 120) as engine:
        found = Collector()
        kept = request("math", range(10, 40), 20, ignore_eos=True)
        engine.submit(kept, found)
        others = [request("code", range(50 + n, 70 + n), 20) for n in range(20)]
        for one in others:
            engine.submit(one, found)
            engine.cancel(one.request_id)
        wait_for(found, kept, *others)
        assert found.generation(kept.request_id).finish_reason == "length"
        for one in others:
            usage = found.generation(one.request_id).usage
            assert usage.prefilled_tokens >= 0
            assert usage.cached_tokens >= 0


def test_a_waiting_request_that_is_cancelled_has_used_nothing(models: ServedModels) -> None:
    engine = engine_of(models, blocks=16)
    run(engine, [request("math", range(10, 30))])
    found = Collector()
    engine.submit(request("math", range(100, 130), 20, ignore_eos=True), found)
    waits = request("math", range(10, 40), 20)
    engine.submit(waits, found)
    for _ in range(3):
        engine.step()
    assert engine.stats().waiting == 1
    before = engine.stats()
    engine.cancel(waits.request_id)
    engine.step()
    usage = found.generation(waits.request_id).usage
    assert (usage.cached_tokens, usage.prefilled_tokens) == (0, 0)
    # Nothing was looked up for it, so that it is no miss.
    assert engine.stats().prompt_tokens == before.prompt_tokens


def test_a_session_ended_while_a_turn_runs_may_begin_again(models: ServedModels) -> None:
    engine = engine_of(models, 60, session_tokens=40, session_idle_s=0.0)
    found = Collector()
    first = request("math", range(10, 30), 30, ignore_eos=True, session="s")
    engine.submit(first, found)
    for _ in range(5):
        engine.step()
    engine.end_session("s")
    second = request("code", range(10, 34), 3, ignore_eos=True, session="s")
    engine.submit(second, found)
    for _ in range(60):
        engine.step()
    assert found.done(first.request_id)
    assert found.done(second.request_id)
    time.sleep(0.01)
    engine.step()
    assert engine.stats().sessions == 0
    assert_nothing_leaks(engine)


def test_a_session_is_not_forgotten_while_its_turn_waits(models: ServedModels) -> None:
    engine = engine_of(
        models,
        blocks=30,
        session_tokens=60,
        session_idle_s=0.05,
        max_decode_rows=1,
        prefill_ahead=1,
    )
    found = Collector()
    run(engine, [request("math", range(10, 30), 2, session="s")])
    for n in range(2):
        engine.submit(request("math", range(100 + n, 110 + n), 12, ignore_eos=True), found)
    engine.step()
    turn = request("math", range(10, 34), 2, session="s")
    engine.submit(turn, found)
    time.sleep(0.1)
    engine.step()
    assert engine.stats().sessions == 1
    for _ in range(80):
        engine.step()
    assert found.generation(turn.request_id).usage.cached_tokens >= 19


def test_sessions_go_where_there_is_a_place(models: ServedModels) -> None:
    options = {"prefill_workers": 2, "session_tokens": 60, "session_idle_s": 1e9}
    with engine_of(models, 40, **options) as engine:
        found = Collector()
        turns = [request("math", range(10, 30), 2, session=name) for name in ("a", "b")]
        for one in turns:
            engine.submit(one, found)
            wait_for(found, one)
        assert engine.stats().sessions == 2


def test_an_unchanged_context_is_no_miss(models: ServedModels) -> None:
    engine = engine_of(models)
    for name in ("math", "code", "full"):
        run(engine, [request(name, range(10, 40), 4, session="s")])
    assert engine.stats().retokenized_misses == 0


def test_an_isolated_session_keeps_each_decoders_blocks(models: ServedModels) -> None:
    engine = engine_of(models, 120, mode="isolated", session_tokens=48, session_idle_s=1e9)
    for _ in range(2):
        for name in ("math", "code"):
            run(engine, [request(name, range(10, 40), 4, session="s")])
    stats = engine.stats()
    assert stats.sessions == 1
    assert stats.blocks_used == 2 * 8, "a prompt of 29 tokens in blocks of 4, for each decoder"
    engine.end_session("s")
    engine.step()
    assert engine.stats().sessions == 0
    assert_nothing_leaks(engine)


def test_a_header_longer_than_the_prompt_is_refused(models: ServedModels) -> None:
    with pytest.raises(ServingError, match="header_length 3 is more than the prompt"):
        engine_of(models).submit(request("tools", (5, 6), 4), print)


def test_counters_never_fall(models: ServedModels) -> None:
    with engine_of(models, 40, prefill_workers=2) as engine:
        for n in range(12):
            engine.generate(request("math", range(10 * n, 10 * n + 40), 2))
        before = engine.stats()
        assert before.evicted_blocks > 0
        engine._loop.receive(PrefillReport(0, 0.0, "killed by the test", lost=True))
        engine.generate(request("math", range(10, 20), 2))
        assert engine.stats().evicted_blocks >= before.evicted_blocks


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_leaves_the_prefill_processes_to_the_engine(
    models: ServedModels, oracle: Oracle, sent: signal.Signals
) -> None:
    threads = torch.get_num_threads()
    with engine_of(models, 60, disaggregated=True) as engine:
        os.kill(engine._loop.workers[0].process.pid, sent)
        time.sleep(0.3)
        one = request("math", range(10, 40), 4)
        assert list(engine.generate(one).token_ids) == oracle.answer("math", one.prompt_ids, 4)
        assert engine.stats().workers_alive == 1
    torch.set_num_threads(threads)


def test_stopping_beside_submitting_answers_everyone(models: ServedModels) -> None:
    engine = engine_of(models, 120)
    engine.start()
    found, accepted = Collector(), []

    def submit() -> None:
        for n in range(200):
            one = request("math", range(10 + n % 50, 30 + n % 50), 3)
            try:
                engine.submit(one, found)
            except EngineStoppedError:
                return
            accepted.append(one)
            time.sleep(0.001)

    thread = threading.Thread(target=submit)
    thread.start()
    time.sleep(0.1)
    engine.stop()
    thread.join()
    assert accepted
    assert all(found.done(one.request_id) for one in accepted)
    assert all(e[-1].finish_reason != "error" for e in found.events.values())
