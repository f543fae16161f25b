"""The workload's own limits, against counting by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.workloads.fakes import plan

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.reuse import Sent, Work, requests_of, speed_bound, work_of

REQUESTS = st.lists(
    st.builds(
        Sent,
        decoder=st.sampled_from("ab"),
        prompt_ids=st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple),
        base_tokens=st.none(),
        completion_tokens=st.integers(1, 5),
    ),
    max_size=12,
)


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def brute_force(sent: list[Sent], mode: Mode) -> int:
    """Prompt tokens that no earlier request had as a prefix."""
    missing = 0
    for number, request in enumerate(sent):
        mine = request.prompt_ids[:-1]
        earlier = [
            common(mine, other.prompt_ids[:-1])
            for other in sent[:number]
            if mode == "shared" or other.decoder == request.decoder
        ]
        missing += len(mine) - max(earlier, default=0)
    return missing


@given(REQUESTS, st.sampled_from(["shared", "isolated"]))
def test_prefill_is_what_no_earlier_request_had(sent: list[Sent], mode: Mode) -> None:
    work = work_of(sent, mode)
    assert work.prefill_tokens == brute_force(sent, mode)
    assert work.base_tokens == sum(len(s.prompt_ids) - 1 for s in sent)
    assert work.decode_tokens == sum(s.completion_tokens for s in sent)


@given(REQUESTS)
def test_sharing_never_prefills_more(sent: list[Sent]) -> None:
    assert work_of(sent, "shared").prefill_tokens <= work_of(sent, "isolated").prefill_tokens


def test_the_warm_up_leaves_tokens_and_does_not_count() -> None:
    early = Sent("a", (1, 2, 3, 4), None, 1)
    late = Sent("a", (1, 2, 3, 9, 9), None, 1)
    assert work_of([late, early], "shared") == Work(7, 4, 2)
    warm = work_of([late], "shared", before=[early])
    assert warm == Work(4, 1, 1)
    assert warm.hit_ratio == pytest.approx(0.75)
    assert work_of([late], "isolated", before=[replace(early, decoder="b")]) == Work(4, 4, 1)


def test_only_what_the_base_supplies_counts() -> None:
    request = Sent("a", (1, 2, 3, 4, 5, 6), 4, 1)
    assert work_of([request, request], "shared") == Work(8, 4, 2)


def test_bound_is_the_ratio_of_work_at_the_measured_rates() -> None:
    shared, isolated = Work(1000, 100, 50), Work(1000, 400, 50)
    bound = speed_bound(shared, isolated, prefill_s=0.01, decode_s=0.02)
    assert bound == pytest.approx((4 + 1) / (1 + 1))


def test_four_decoders_on_one_context_spare_three_of_four_prefills() -> None:
    sessions = plan(
        "uniform", system_tokens=0, context_tokens=4000, response_tokens=1, calls=4
    ).sessions(1)
    shared, isolated = (work_of(requests_of(sessions), m) for m in ("shared", "isolated"))
    assert isolated.prefill_tokens / shared.prefill_tokens == pytest.approx(4, rel=0.01)
    one = plan("react", decoders=("a",)).sessions(3)
    assert work_of(requests_of(one), "shared") == work_of(requests_of(one), "isolated")
