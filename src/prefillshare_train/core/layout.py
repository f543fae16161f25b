"""Who sees whom: packed rows, segments and groups.

Training never pads. A batch is one packed row of tokens for the base (each conversation's prompt,
end to end) and one for the decoder (each trained turn from its boundary on). A `Segment` is one
stretch of a packed row that is run together; a query in it at offset i sees

- the recorded K/V of `[past_start, past_start + past_length)` in the prompt cache, and
- the segment's own K/V at offsets `<= i`,

cut by a sliding window where a layer has one, and nothing else. The absolute position of offset i
is `past_length + i`, because a segment always goes on where its past ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a packed row and the stretch of the prompt cache that it continues."""

    query_length: int
    past_start: int = 0
    past_length: int = 0


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Neighbouring segments of one shape, so that attention runs them as one batch.

    Attributes:
        query_start: offset of the first segment in the packed row.
        query_length: tokens in each segment.
        past_starts: for each segment, where its past begins in the packed prompt cache.
        past_length: tokens of past that each segment sees.
    """

    query_start: int
    query_length: int
    past_starts: tuple[int, ...]
    past_length: int

    @property
    def count(self) -> int:
        """Number of segments in the group."""
        return len(self.past_starts)

    @property
    def query_end(self) -> int:
        """Offset in the packed row just past the last segment."""
        return self.query_start + self.count * self.query_length


def group_segments(segments: Iterable[Segment]) -> tuple[SegmentGroup, ...]:
    """Lay segments end to end in a packed row and merge neighbours of equal shape."""
    groups: list[SegmentGroup] = []
    for segment in segments:
        last = groups[-1] if groups else None
        if (
            last is not None
            and last.query_length == segment.query_length
            and last.past_length == segment.past_length
        ):
            groups[-1] = SegmentGroup(
                last.query_start,
                last.query_length,
                (*last.past_starts, segment.past_start),
                last.past_length,
            )
        else:
            start = last.query_end if last is not None else 0
            groups.append(
                SegmentGroup(
                    start, segment.query_length, (segment.past_start,), segment.past_length
                )
            )
    return tuple(groups)


def positions_of(segments: Sequence[Segment]) -> list[int]:
    """Absolute position of every token of a packed row of segments."""
    positions: list[int] = []
    for segment in segments:
        positions.extend(range(segment.past_length, segment.past_length + segment.query_length))
    return positions
