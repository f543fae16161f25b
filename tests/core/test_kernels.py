"""The two routes of segment attention agree, and equal attention written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefillshare_train.core import kernels
from prefillshare_train.core.layout import Segment, group_segments


def written_out(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None,
    scaling: float, window: int | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Shapes as in `_attend_blocks`, one query at a time."""
    fold = query.shape[0] // key.shape[0]
    length = 0
    if past is not None:
        length = past[0].shape[2]
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    key, value = key.repeat_interleave(fold, 0), value.repeat_interleave(fold, 0)
    output = torch.empty_like(query)
    for i in range(query.shape[2]):
        position = length + i
        low = 0 if window is None else max(0, position - window + 1)
        scores = (query[:, :, i, None] @ key[:, :, low : position + 1].mT)[:, :, 0] * scaling
        if sinks is not None:
            column = sinks[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : position + 1 - low]
        output[:, :, i] = (weights[:, :, None] @ value[:, :, low : position + 1])[:, :, 0]
    return output


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    fold=st.integers(1, 3),
    count=st.integers(1, 3),
    length=st.integers(1, 150),
    past_length=st.integers(0, 90),
    window=st.one_of(st.none(), st.integers(1, 120)),
    with_sinks=st.booleans(),
)
def test_both_routes_equal_attention_written_out(
    kv_heads: int, fold: int, count: int, length: int, past_length: int, window: int | None,
    with_sinks: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(heads, count, tokens, 4, dtype=torch.float64)

    heads = kv_heads * fold
    query, key, value = draw(heads, length), draw(kv_heads, length), draw(kv_heads, length)
    past = (draw(kv_heads, past_length), draw(kv_heads, past_length)) if past_length else None
    sinks = torch.randn(heads, dtype=torch.float64) if with_sinks else None
    expected = written_out(query, key, value, past, 0.5, window, sinks)
    for route in (kernels._attend_blocks, kernels._attend_sdpa):
        output = route(query, key, value, past, 0.5, 0.0, window, sinks)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(3, 5, 4), Segment(3, 0, 4), Segment(2, 1, 6)],
        [Segment(3, 0, 4), Segment(3, 5, 4), Segment(2, 9, 0)],
        [Segment(3, 1, 4), Segment(3, 5, 4), Segment(2, 0, 1)],
    ],
    ids=["back to front", "with a gap", "end to end"],
)
def test_segments_read_their_own_past_wherever_it_lies(segments: list[Segment]) -> None:
    torch.manual_seed(0)
    row = [torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3)]
    cache = (
        torch.randn(2, 9, 4, dtype=torch.float64),
        torch.randn(2, 9, 4, dtype=torch.float64),
    )
    output = kernels.attend_segments(*row, group_segments(segments), cache, scaling=0.5)
    start = 0
    for segment in segments:
        rows = slice(start, start + segment.query_length)
        own = [t[0, :, None, rows] for t in row]
        held = slice(segment.past_start, segment.past_start + segment.past_length)
        past = (cache[0][:, None, held], cache[1][:, None, held])
        expected = written_out(*own, past, 0.5, None, None)
        torch.testing.assert_close(output[0, rows].transpose(0, 1), expected[:, 0])
        start += segment.query_length


def test_dropout_thins_the_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 5, 4), torch.randn(1, 1, 5, 4)
    past = (torch.randn(1, 1, 7, 4), torch.randn(1, 1, 7, 4))
    count = 4000
    many = [t.expand(-1, count, -1, -1) for t in (query, key, key)]
    many_past = (past[0].expand(-1, count, -1, -1), past[1].expand(-1, count, -1, -1))
    for route in (kernels._attend_blocks, kernels._attend_sdpa):
        expected = route(query, key, key, past, 0.5, 0.0, None, None)[:, 0]
        drawn = route(*many, many_past, 0.5, 0.3, None, None)
        assert drawn.std(dim=1).min() > 0.05
        torch.testing.assert_close(drawn.mean(dim=1), expected, rtol=0, atol=0.08)


def test_more_keys_than_queries_without_a_mask_is_refused() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="3 queries over 5 keys"):
        kernels.masked_attention(query, key, key, None, 0.5)


@pytest.mark.parametrize(
    ("grad", "past", "own", "window", "route"),
    [
        (False, 40, 8, None, "_attend_sdpa"),
        (False, 1024, 512, None, "_attend_sdpa"),
        # A mask over all keys would be larger than any block of scores.
        (False, 1024, 513, None, "_attend_blocks"),
        (False, 4, 8, None, "_attend_blocks"),
        (False, 40, 8, 16, "_attend_blocks"),
        (True, 40, 8, None, "_attend_blocks"),
    ],
)
def test_a_chunk_after_a_longer_past_takes_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, grad: bool, past: int, own: int, window: int | None, route: str
) -> None:
    taken = []
    for name in ("_attend_blocks", "_attend_sdpa"):
        real = getattr(kernels, name)

        def spy(*arguments: object, name: str = name, real: object = real) -> Tensor:
            taken.append(name)
            return real(*arguments)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(kernels, name, spy)
    query, key, value = (torch.randn(1, heads, own, 4) for heads in (4, 2, 2))
    held = (torch.randn(2, past, 4), torch.randn(2, past, 4))
    groups = group_segments([Segment(own, 0, past)])
    with torch.set_grad_enabled(grad):
        kernels.attend_segments(query, key, value, groups, held, scaling=0.5, sliding_window=window)
    assert taken == [route]
