"""Sessions: the same from a seed alone, decoders in turn, one growing context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.workloads.fakes import DECODERS, plan

from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.lengths import BUILT_IN, PROBABILITIES, Quantiles
from prefillshare_train.workloads.sessions import CUE_TOKENS, Response, poisson_arrivals


@pytest.mark.parametrize("kind", ["react", "reflexion", "uniform"])
def test_a_session_is_the_same_whatever_is_drawn_beside_it(kind: str) -> None:
    drawn = plan(kind, lengths=BUILT_IN)
    many = drawn.sessions(6)
    assert drawn.sessions(2, first=3) == many[3:5]
    assert many != plan(kind, lengths=BUILT_IN, seed=1).sessions(6)
    assert len({session.turns for session in many}) == 6


@pytest.mark.parametrize("kind", ["react", "reflexion", "uniform"])
def test_decoders_are_called_in_turn(kind: str) -> None:
    for session in plan(kind, lengths=BUILT_IN).sessions(3):
        for number, turn in enumerate(session.turns):
            assert turn.decoder == DECODERS[number % 4]
            assert len(turn.scripted) == turn.max_tokens


def test_react_context_grows_by_every_response_and_observation() -> None:
    [session] = plan("react").sessions(1)
    responses = [turn.scripted for turn in session.turns]
    prompts = session.prompts()
    assert [turn.max_tokens for turn in session.turns] == [5, 2] * 3
    assert len(prompts[0]) == 8 + 3 + CUE_TOKENS
    for number in range(1, len(prompts)):
        before = prompts[number - 1] + responses[number - 1]
        assert prompts[number][: len(before)] == before
        observed = 7 if number % 2 == 0 else 0
        assert len(prompts[number]) == len(before) + observed + CUE_TOKENS
    assert session.tokens == len(prompts[-1]) + 2


def test_prompts_take_the_responses_that_they_are_given() -> None:
    [session] = plan("react").sessions(1)
    turn = session.turns[2]
    assert [piece for piece in turn.prompt if isinstance(piece, Response)] == [
        Response(0),
        Response(1),
    ]
    prompt = turn.prompt_ids([(901, 902), (903,)])
    assert [token for token in prompt if token > 900] == [901, 902, 903]


def test_reflexion_trials_begin_anew_with_the_reflection() -> None:
    [session] = plan("reflexion", trials=3, context_tokens=5).sessions(1)
    lengths = [turn.max_tokens for turn in session.turns]
    assert lengths == [*[5, 2] * 3, 4, 6, *[5, 2] * 3, 4, 6, *[5, 2] * 3, 4]
    prompts = session.prompts()
    start, again, last = prompts[0], prompts[8], prompts[16]
    shared = 8 + 5
    assert start[:shared] == again[:shared] == last[:shared]
    # The reflection of the first trial comes next, and the question behind it.
    first, second = session.turns[7].scripted, session.turns[15].scripted
    assert again[shared : shared + 6] == first
    assert last[shared : shared + 12] == first + second
    assert again[shared + 6 : shared + 9] == start[shared : shared + 3]


def test_uniform_sessions_have_the_asked_sizes() -> None:
    options = {"system_tokens": 0, "context_tokens": 40, "response_tokens": 6, "calls": 5}
    [session] = plan("uniform", **options).sessions(1)
    assert [turn.max_tokens for turn in session.turns] == [6] * 5
    assert len(session.prompts()[0]) == 40 + CUE_TOKENS


def test_sessions_share_the_system_prompt_and_nothing_else() -> None:
    first, second = plan("react", vocabulary=tuple(range(100_000))).sessions(2)
    a, b = first.prompts()[0], second.prompts()[0]
    assert a[:8] == b[:8]
    assert a[8:] != b[8:]


@given(st.floats(0.01, 100), st.integers(0, 5))
def test_arrivals_are_one_pattern_stretched_by_the_rate(rate: float, seed: int) -> None:
    sessions = plan("uniform", calls=1).sessions(4)
    unit = poisson_arrivals(sessions, 1.0, seed)
    stretched = poisson_arrivals(sessions, rate, seed)
    for one, other in zip(unit, stretched, strict=True):
        assert other.at_s == pytest.approx(one.at_s / rate)
        assert other.turns == one.turns


def test_arrivals_come_at_the_rate_and_are_exponential() -> None:
    [session] = plan("uniform", calls=1).sessions(1)
    times = [s.at_s for s in poisson_arrivals([session] * 4000, 5.0, seed=2)]
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)
    assert all(s.at_s == 0 for s in poisson_arrivals([session] * 3, None, seed=2))


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=50), st.integers(0, 1000))
def test_draws_stay_within_the_samples(samples: list[float], seed: int) -> None:
    drawn = Quantiles.of(samples).draw(np.random.default_rng(seed))
    assert round(min(samples)) <= drawn <= round(max(samples))


def test_draws_follow_the_quantiles() -> None:
    quantiles = Quantiles((1, 2, 10, 20, 40, 80, 100))
    generator = np.random.default_rng(0)
    drawn = [quantiles.draw(generator) for _ in range(20_000)]
    found = np.quantile(drawn, PROBABILITIES)
    assert found[1:-1] == pytest.approx(quantiles.values[1:-1], rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chess"}, "none of react, reflexion, uniform"),
        ({"decoders": ()}, "at least one decoder"),
        ({"system_tokens": -1}, "0 or more"),
        ({"trials": 0}, "1 or more"),
    ],
)
def test_plans_that_cannot_be_drawn_are_refused(options: dict, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        plan(**options)


def test_rates_and_quantiles_are_checked() -> None:
    with pytest.raises(WorkloadError, match="above 0"):
        poisson_arrivals(plan().sessions(1), 0.0, 0)
    with pytest.raises(WorkloadError, match="ascending"):
        Quantiles((3, 2, 1, 1, 1, 1, 1))
