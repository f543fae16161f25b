"""Where the one-call kernel looks for each segment's keys. (The kernel itself: tests/gpu.)"""

from __future__ import annotations

import pytest
import torch
from tests.core.test_kernels import written_out

from prefillshare_train.core.flash import flash_can_run, ragged_row
from prefillshare_train.core.layout import Segment, group_segments

PAST = 40
ROWS = {
    "prompts": [Segment(5), Segment(5), Segment(1), Segment(9)],
    "responses": [Segment(3, 0, 12), Segment(3, 12, 12), Segment(1, 30, 2), Segment(4, 24, 6)],
    "one without a past": [Segment(6, 20, 20), Segment(2, 3, 8), Segment(7)],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_laid_out_is_each_segments_attention(name: str) -> None:
    torch.manual_seed(0)
    segments = ROWS[name]
    groups = group_segments(segments)
    tokens, past_tokens = groups[-1].query_end, 0 if name == "prompts" else PAST
    row = ragged_row(groups, past_tokens, torch.device("cpu"))
    query = torch.randn(4, tokens, 8, dtype=torch.float64)
    own = torch.randn(2, tokens, 8, dtype=torch.float64)
    past = torch.randn(2, past_tokens, 8, dtype=torch.float64)
    joined = torch.cat([past, own], dim=1)
    keys = joined if row.keys is None else joined[:, row.keys]
    assert keys.shape[1] == row.key_ends[-1]
    assert row.query_ends[-1] == tokens
    assert row.longest_query == max(s.query_length for s in segments)
    assert row.longest_key == max(s.query_length + s.past_length for s in segments)
    start = 0
    for number, segment in enumerate(segments):
        mine = slice(start, start + segment.query_length)
        assert (row.query_ends[number], row.query_ends[number + 1]) == (mine.start, mine.stop)
        seen = keys[:, row.key_ends[number] : row.key_ends[number + 1], None].transpose(1, 2)
        stop = segment.past_start + segment.past_length
        held = past[:, None, segment.past_start : stop]
        mine_own = own[:, None, mine]
        queries = query[:, None, mine]
        expected = written_out(queries, mine_own, mine_own, (held, held), 0.3, None, None)
        before, after = seen[:, :, : segment.past_length], seen[:, :, segment.past_length :]
        found = written_out(queries, after, after, (before, before), 0.3, None, None)
        torch.testing.assert_close(found, expected)
        start = mine.stop


def test_the_cpu_has_no_such_kernel() -> None:
    rows = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16)
    assert not flash_can_run(rows, rows, None)
