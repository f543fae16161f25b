"""Length distributions."""

from __future__ import annotations

import pytest

from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.data.report import Lengths, SplitReport


def test_percentiles_are_nearest_rank() -> None:
    lengths = Lengths.of(range(100, 0, -1))
    assert (lengths.minimum, lengths.p50, lengths.p90, lengths.p99, lengths.maximum) == (
        1,
        50,
        90,
        99,
        100,
    )
    assert (lengths.count, lengths.total) == (100, 5050)


@pytest.mark.parametrize(
    ("values", "histogram"),
    [
        ([], []),
        ([16, 17, 32, 33], [(16, 1), (32, 2), (64, 1)]),
        ([32768, 32769, 99999], [(32768, 1), (99999, 2)]),
    ],
)
def test_histogram_bounds_are_inclusive(
    values: list[int], histogram: list[tuple[int, int]]
) -> None:
    lengths = Lengths.of(values)
    assert lengths.histogram == histogram
    assert sum(count for _, count in lengths.histogram) == lengths.count == len(values)


def test_one_value_is_every_percentile() -> None:
    lengths = Lengths.of([7])
    assert {lengths.minimum, lengths.p50, lengths.p90, lengths.p99, lengths.maximum} == {7}


def test_split_sizes() -> None:
    conversation = Conversation(tuple(range(10)), (Turn(2, 4), Turn(6, 10)))
    report = SplitReport.of([conversation, conversation])
    assert (report.conversations, report.turns) == (2, 4)
    assert (report.tokens, report.response_tokens) == (20, 12)
    assert report.lengths["prompt"].total == 16
    assert report.lines("train")[0] == (
        "train: 2 conversations, 4 turns, 20 tokens, 12 of them trained"
    )
