"""Packed batches: every token where its turn needs it, nothing twice, nothing padded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.layout import Segment, SegmentGroup, group_segments, positions_of
from prefillshare_train.core.packing import BatchLayout, pack
from prefillshare_train.core.spans import Conversation, Turn

STRIDE = 10_000
"""Token ids tell where they come from: conversation * STRIDE + position."""

RULES = ("last_token", "generation_prompt", "block_aligned:4", "ratio:0", "ratio:0.5", "ratio:1")


@st.composite
def conversation_lists(draw: st.DrawFn) -> list[Conversation]:
    # Few lengths, so that equal shapes meet.
    turn = st.tuples(st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 2, 4]), st.integers(1, 9))
    shapes = st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=6)
    rows = []
    for number, shape in enumerate(draw(shapes)):
        turns, length = [], 0
        for prompt, response, header in shape:
            start = length + prompt
            turns.append(Turn(start, start + response, min(header, start)))
            length = start + response
        length += draw(st.integers(0, 2))
        rows.append(Conversation(tuple(number * STRIDE + i for i in range(length)), tuple(turns)))
    return rows


def segments_of(groups: Sequence[SegmentGroup]) -> list[tuple[int, Segment]]:
    """(offset in the row, segment) of every segment of every group."""
    return [
        (group.query_start + i * group.query_length, Segment(group.query_length, past, length))
        for group in groups
        for i, past in enumerate(group.past_starts)
        for length in [group.past_length]
    ]


def unpacked(batch: dict[str, Any], name: str) -> list[int]:
    ids: list[int] = batch[name][0].tolist()
    return ids


@settings(max_examples=150, deadline=None)
@given(rows=conversation_lists(), rule=st.sampled_from(RULES))
def test_each_turn_continues_its_own_conversation_from_its_boundary(
    rows: list[Conversation], rule: str
) -> None:
    parsed = BoundaryRule.parse(rule)
    batch = pack(rows, parsed)
    layout: BatchLayout = batch["layout"]
    prefill, decode = unpacked(batch, "prefill_ids"), unpacked(batch, "input_ids")
    assert [i % STRIDE for i in decode] == unpacked(batch, "position_ids")

    expected = []
    for number, row in enumerate(rows):
        for turn in row.turns:
            start = parsed.base_length(turn.prompt_length, turn.header_length)
            expected.append((number, start, turn.end - 1))
    found, cursor = [], 0
    for offset, segment in segments_of(layout.decode_groups):
        assert offset == cursor, "segments lie end to end"
        cursor += segment.query_length
        own = decode[offset:cursor]
        number, start = divmod(own[0], STRIDE)
        assert own == [number * STRIDE + i for i in range(start, start + len(own))]
        assert start == segment.past_length
        held = prefill[segment.past_start : segment.past_start + segment.past_length]
        assert held == [number * STRIDE + i for i in range(start)]
        found.append((number, start, start + len(own)))
    assert cursor == len(decode), "no token belongs to no segment: nothing is padded"
    assert sorted(found) == sorted(expected)


@settings(max_examples=150, deadline=None)
@given(
    rows=conversation_lists(),
    rule=st.sampled_from(RULES),
    method=st.sampled_from(["prefillshare", "full_prompt"]),
)
def test_targets_are_shifted_and_every_response_token_is_one(
    rows: list[Conversation], rule: str, method: Any
) -> None:
    batch = pack(rows, BoundaryRule.parse(rule), method)
    decode, labels = unpacked(batch, "input_ids"), unpacked(batch, "labels")
    before = [decode[i] for i in unpacked(batch, "target_index")]
    assert labels == [i + 1 for i in before]
    responses = [
        i for row in rows for t in row.turns for i in row.token_ids[t.prompt_length : t.end]
    ]
    assert sorted(labels) == sorted(responses)
    assert batch["layout"].response_tokens == len(labels) == sum(r.response_tokens for r in rows)


@settings(max_examples=100, deadline=None)
@given(rows=conversation_lists(), rule=st.sampled_from(RULES))
def test_the_base_runs_each_prompt_once_as_far_as_anybody_reads(
    rows: list[Conversation], rule: str
) -> None:
    parsed = BoundaryRule.parse(rule)
    batch = pack(rows, parsed)
    layout: BatchLayout = batch["layout"]
    prefill, cursor, lengths = unpacked(batch, "prefill_ids"), 0, {}
    for length in layout.prompt_lengths:
        prompt = prefill[cursor : cursor + length]
        if prompt:
            number = prompt[0] // STRIDE
            assert prompt == [number * STRIDE + i for i in range(length)]
            lengths[number] = length
        cursor += length
    assert cursor == len(prefill)
    for number, row in enumerate(rows):
        read = [parsed.base_length(t.prompt_length, t.header_length) for t in row.turns]
        assert lengths.get(number, 0) == max(read)
    ran = [segment.query_length for _, segment in segments_of(layout.prefill_groups)]
    assert ran == [n for n in layout.prompt_lengths if n]
    assert all(not s.past_length for _, s in segments_of(layout.prefill_groups))


@settings(max_examples=100, deadline=None)
@given(rows=conversation_lists(), method=st.sampled_from(["prefillshare", "full_prompt"]))
def test_counts_are_those_of_the_segments(rows: list[Conversation], method: Any) -> None:
    batch = pack(rows, BoundaryRule.parse("last_token"), method)
    layout: BatchLayout = batch["layout"]

    def pairs(groups: Sequence[SegmentGroup]) -> int:
        return sum(
            s.past_length + i + 1 for _, s in segments_of(groups) for i in range(s.query_length)
        )

    assert layout.decode_pairs == pairs(layout.decode_groups)
    assert layout.prefill_pairs == pairs(layout.prefill_groups)
    assert layout.max_position == max(unpacked(batch, "position_ids"))
    assert layout.conversations == len(rows)
    assert layout.prompt_tokens == sum(row.turns[-1].prompt_length for row in rows)


@settings(max_examples=60, deadline=None)
@given(rows=conversation_lists())
def test_full_prompt_gives_the_decoder_the_whole_text_and_the_base_none(
    rows: list[Conversation],
) -> None:
    batch = pack(rows, BoundaryRule.parse("last_token"), "full_prompt")
    assert batch["prefill_ids"].shape == (1, 0)
    whole = [row.token_ids[: row.turns[-1].end - 1] for row in rows]
    assert sorted(unpacked(batch, "input_ids")) == sorted(i for ids in whole for i in ids)
    segments = [segment for _, segment in segments_of(batch["layout"].decode_groups)]
    assert sorted(s.query_length for s in segments) == sorted(map(len, whole))
    assert all(not s.past_length for s in segments)


@given(
    st.lists(
        st.builds(Segment, st.integers(1, 3), st.integers(0, 9), st.integers(0, 2)), max_size=12
    )
)
def test_grouping_keeps_every_segment_in_its_place(segments: list[Segment]) -> None:
    groups = group_segments(segments)
    found = segments_of(groups)
    assert [segment for _, segment in found] == segments
    starts = [sum(s.query_length for s in segments[:i]) for i in range(len(segments))]
    assert [offset for offset, _ in found] == starts
    shapes = [(g.query_length, g.past_length) for g in groups]
    assert all(a != b for a, b in itertools.pairwise(shapes)), "neighbours are merged"
    assert len(positions_of(segments)) == (groups[-1].query_end if groups else 0)


def test_equal_shapes_become_one_group_wherever_they_stood() -> None:
    shapes = [(9, 12), (5, 7), (9, 12), (5, 7), (9, 12)]
    rows = [Conversation(tuple(range(end)), (Turn(prompt, end),)) for prompt, end in shapes]
    layout: BatchLayout = pack(rows, BoundaryRule.parse("last_token"))["layout"]
    assert [group.count for group in layout.decode_groups] == [3, 2]
    assert [group.count for group in layout.prefill_groups] == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "a prompt and a response of one token or more"),
        ((3, 3), "a prompt and a response of one token or more"),
        ((3, 5, 4), "the assistant header has 4 tokens"),
        ((3, 5, -1), "the assistant header has -1 tokens"),
    ],
)
def test_impossible_turns_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Turn(*arguments)


def test_impossible_conversations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one turn"):
        Conversation((1, 2, 3), ())
    with pytest.raises(ValueError, match="must not overlap"):
        Conversation(tuple(range(9)), (Turn(2, 5), Turn(4, 8)))
    with pytest.raises(ValueError, match="past the 3 tokens"):
        Conversation((1, 2, 3), (Turn(2, 4),))
