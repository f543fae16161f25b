"""Tokens are picked by each request's own rules."""

from __future__ import annotations

import math

import pytest
import torch
from tests.serving.served import Oracle, engine_of, request, run

from prefillshare_train.serving.api import SamplingParams, ServingError
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.sampling import TokenPicker, pick_token

PROMPT = tuple(range(20, 50))


def picks(logits: list[float], count: int = 400, **options: object) -> set[int]:
    picker = TokenPicker(SamplingParams(temperature=1.0, seed=1, **options), torch.device("cpu"))
    return {picker.pick(torch.tensor(logits), ()) for _ in range(count)}


def test_cuts_leave_only_what_they_should() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert picks(logits) == {0, 1, 2, 3}
    assert picks(logits, top_k=2) == {0, 1}
    assert picks(logits, top_p=0.7) == {0, 1}
    assert picks(logits, min_p=0.2) == {0, 1, 2}


def test_temperature_spreads_the_draws() -> None:
    logits = torch.tensor([2.0, 0.0])

    def share(temperature: float) -> float:
        params = SamplingParams(temperature=temperature, seed=3)
        picker = TokenPicker(params, torch.device("cpu"))
        return sum(picker.pick(logits, ()) for _ in range(2000)) / 2000

    for temperature in (0.5, 1.0, 4.0):
        expected = 1 / (1 + math.exp(2.0 / temperature))
        assert share(temperature) == pytest.approx(expected, abs=0.04)


def test_a_repetition_penalty_sees_prompt_and_response() -> None:
    params = SamplingParams(repetition_penalty=4.0)
    picker = TokenPicker(params, torch.device("cpu"))
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert picker.pick(logits, (2,)) == 0
    assert picker.pick(logits, (0,)) == 1
    assert picker.pick(logits, (0, 1)) == 2


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    picker = TokenPicker(SamplingParams(temperature=1e-39), torch.device("cpu"))
    assert picker.pick(torch.tensor([0.0, 3.0, 1.0]), ()) == 1
    whole = TokenPicker(SamplingParams(temperature=2, top_p=1, min_p=1), torch.device("cpu"))
    assert whole.pick(torch.tensor([0.0, 3.0, 1.0]), ()) == 1


def test_a_seed_decides_whatever_shares_the_batch(models: ServedModels) -> None:
    options = {"temperature": 2.0, "seed": 11, "ignore_eos": True}
    one = request("math", PROMPT, 20, **options)
    alone = run(engine_of(models), [one]).generation(one.request_id)
    again = request("math", PROMPT, 20, **options)
    others = [request("code", PROMPT[: 5 + n], 20, temperature=1.0) for n in range(3)]
    engine = engine_of(models, 200)
    together = run(engine, [*others, again]).generation(again.request_id)
    assert together.token_ids == alone.token_ids
    other = request("math", PROMPT, 20, **(options | {"seed": 12}))
    assert run(engine, [other]).generation(other.request_id).token_ids != alone.token_ids


def test_logprobs_are_those_of_the_raw_logits(models: ServedModels) -> None:
    one = request("math", PROMPT, 5, logprobs=3, ignore_eos=True)
    answer = run(engine_of(models), [one]).generation(one.request_id)
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))
        assert [value for _, value in entry.top] == sorted((v for _, v in entry.top), reverse=True)
        assert len(entry.top) == 3
    logits = torch.randn(50)
    device = torch.device("cpu")
    best = int(logits.argmax())
    token, entry = pick_token(logits, best, TokenPicker(SamplingParams(logprobs=0), device), tuple)
    assert token == best
    assert entry is not None
    assert entry.logprob == pytest.approx(float(logits.log_softmax(-1).max()))
    assert entry.top == ()
    assert pick_token(logits, best, TokenPicker(SamplingParams(), device), tuple) == (best, None)


def test_stop_strings_end_a_response_before_themselves(
    models: ServedModels, oracle: Oracle
) -> None:
    whole = request("math", PROMPT, 30, ignore_eos=True)
    engine = engine_of(models)
    text = run(engine, [whole]).generation(whole.request_id).text
    stop = text[6:9]
    one = request("math", PROMPT, 30, ignore_eos=True, stop=(stop, "never there"))
    answer = run(engine, [one]).generation(one.request_id)
    assert answer.text == text[: text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.usage.completion_tokens < 30


def test_stop_token_ids_and_the_longest_response(models: ServedModels) -> None:
    engine = engine_of(models)
    whole = request("math", PROMPT, 12, ignore_eos=True)
    ids = run(engine, [whole]).generation(whole.request_id).token_ids
    one = request("math", PROMPT, 12, ignore_eos=True, stop_token_ids=(ids[4],))
    answer = run(engine, [one]).generation(one.request_id)
    first = ids.index(ids[4])
    assert answer.token_ids == ids[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids[4])
    assert len(ids) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ServingError, match=f"{field} must be"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
