"""The engine answers as `core.generate` does, and shares what it can."""

from __future__ import annotations

import random

import pytest
from tests.serving.served import (
    DECODERS,
    Oracle,
    assert_nothing_leaks,
    engine_of,
    request,
    run,
)

from prefillshare_train.serving.api import QueueFullError, ServingError
from prefillshare_train.serving.models import ServedModels

EVERYONE = (*DECODERS, "base")


def prompt(seed: int, length: int) -> tuple[int, ...]:
    chosen = random.Random(seed)
    return tuple(chosen.randrange(4, 200) for _ in range(length))


@pytest.mark.parametrize("name", EVERYONE)
@pytest.mark.parametrize("length", [4, 5, 17, 40])
def test_one_request_is_answered_as_core_generate_does(
    models: ServedModels, oracle: Oracle, name: str, length: int
) -> None:
    engine = engine_of(models)
    one = request(name, prompt(length, length), 12)
    answer = run(engine, [one]).generation(one.request_id)
    assert list(answer.token_ids) == oracle.answer(name, one.prompt_ids, 12)
    assert_nothing_leaks(engine)


def test_many_at_once_are_answered_as_alone(models: ServedModels, oracle: Oracle) -> None:
    engine = engine_of(models, blocks=200, max_decode_rows=9)
    requests = [
        request(EVERYONE[n % len(EVERYONE)], prompt(n % 5, 6 + 5 * (n % 5)), 3 + n % 9)
        for n in range(28)
    ]
    found = run(engine, requests)
    for one in requests:
        expected = oracle.answer(one.decoder, one.prompt_ids, one.sampling.max_tokens)
        assert list(found.generation(one.request_id).token_ids) == expected
    assert len({tuple(found.generation(r.request_id).token_ids) for r in requests}) > 15
    assert_nothing_leaks(engine)


def test_decoders_share_one_prefill(models: ServedModels) -> None:
    engine = engine_of(models)
    same = prompt(1, 30)
    requests = [request(name, same) for name in ("math", "code", "full", "base")]
    found = run(engine, requests)
    usages = [found.generation(r.request_id).usage for r in requests]
    assert [u.prefilled_tokens for u in usages] == [29, 0, 0, 0]
    assert [u.cached_tokens for u in usages] == [0, 29, 29, 29]
    assert engine.stats().prefilled_tokens == 29


def test_isolated_decoders_share_nothing(models: ServedModels, oracle: Oracle) -> None:
    engine = engine_of(models, mode="isolated")
    same = prompt(1, 30)
    requests = [request(name, same) for name in ("math", "code", "math")]
    found = run(engine, requests)
    assert engine.stats().prefilled_tokens == 58
    for one in requests:
        expected = oracle.answer(one.decoder, same, 8)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_salts_keep_tenants_apart(models: ServedModels) -> None:
    engine = engine_of(models)
    same = prompt(1, 30)
    run(engine, [request("math", same, cache_salt="a")])
    run(engine, [request("math", same, cache_salt="b")])
    assert engine.stats().prefilled_tokens == 58
    run(engine, [request("code", same, cache_salt="b")])
    assert engine.stats().prefilled_tokens == 58


def test_the_next_turn_prefills_only_what_is_new(models: ServedModels, oracle: Oracle) -> None:
    engine = engine_of(models)
    first = request("math", prompt(2, 21), 6)
    answer = run(engine, [first]).generation(first.request_id)
    longer = (*first.prompt_ids, *answer.token_ids, *prompt(3, 9))
    second = request("code", longer, 6)
    found = run(engine, [second]).generation(second.request_id)
    # The base has run all but the last prompt token of the first turn, and nothing of its answer.
    assert found.usage.cached_tokens == 20
    assert list(found.token_ids) == oracle.answer("code", longer, 6)


def test_eviction_changes_nothing_but_the_work(models: ServedModels, oracle: Oracle) -> None:
    engine = engine_of(models, blocks=16)
    for turn in range(12):
        one = request(EVERYONE[turn % 6], prompt(turn % 4, 30), 5)
        found = run(engine, [one]).generation(one.request_id)
        assert list(found.token_ids) == oracle.answer(one.decoder, one.prompt_ids, 5)
    stats = engine.stats()
    assert stats.evicted_blocks > 0
    assert stats.peak_kv_bytes <= 16 * stats.block_bytes
    assert_nothing_leaks(engine)


def test_staged_blocks_come_back_unchanged(models: ServedModels, oracle: Oracle) -> None:
    engine = engine_of(models, blocks=16, staging_bytes=1 << 20)
    for turn in range(12):
        one = request("math", prompt(turn % 4, 30), 5)
        found = run(engine, [one]).generation(one.request_id)
        assert list(found.token_ids) == oracle.answer("math", one.prompt_ids, 5)
    stats = engine.stats()
    assert stats.prefilled_tokens == 4 * 29, "a staged prompt was run again"
    assert stats.staged_in_bytes > 0
    assert stats.staged_out_bytes > 0
    assert stats.staged_blocks > 0


def test_a_cancelled_request_frees_its_blocks_at_once(models: ServedModels) -> None:
    engine = engine_of(models)
    one = request("math", prompt(1, 20), 100)
    collected = []
    engine.submit(one, collected.append)
    for _ in range(6):
        engine.step()
    assert engine.stats().decoding == 1
    engine.cancel(one.request_id)
    engine.step()
    assert collected[-1].finish_reason == "cancelled"
    assert_nothing_leaks(engine)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"decoder": "nobody"}, "no decoder 'nobody'; served are: math"),
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"prompt_ids": (5, 100000)}, "token id 100000 is not in the vocabulary"),
        ({"prompt_ids": (5,) * 300}, "the model has 256"),
        ({"prompt_ids": (5,) * 200, "max_tokens": 57}, "take 65 blocks; .* has 64"),
        ({"decoder": "tools", "header_length": 0}, "generation_prompt needs a template"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(
    models: ServedModels, fault: dict[str, object], message: str
) -> None:
    settings = {"decoder": "math", "prompt_ids": (5, 6, 7), "max_tokens": 4} | fault
    header = settings.pop("header_length", 3)
    one = request(settings.pop("decoder"), settings.pop("prompt_ids"), **settings)
    object.__setattr__(one, "header_length", header)
    with pytest.raises(ServingError, match=message):
        engine_of(models).submit(one, print)


def test_a_full_queue_says_when_to_come_back(models: ServedModels) -> None:
    engine = engine_of(models, max_waiting=2)
    for n in range(2):
        engine.submit(request("math", prompt(n, 9)), lambda event: None)
    with pytest.raises(QueueFullError, match="2 requests are waiting") as refused:
        engine.submit(request("math", prompt(7, 9)), lambda event: None)
    assert refused.value.retry_after_s >= 1
    while engine.stats().waiting:
        engine.step()
    engine.submit(request("math", prompt(7, 9)), lambda event: None)


def test_budgets_that_cannot_be_are_refused(models: ServedModels) -> None:
    with pytest.raises(ServingError, match="fewer than two blocks"):
        engine_of(models, blocks=1)
    with pytest.raises(ServingError, match="MiB of memory are free; lower it"):
        engine_of(models, blocks=1 << 40)
