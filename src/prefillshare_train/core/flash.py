"""Attention over a whole packed row in one FlashAttention call, on CUDA in half precision.

SDPA takes segments of one shape at a time, and with a mask it has no fused kernel for grouped query
heads. FlashAttention's variable-length kernel takes a row of any segments, aligns the causal
triangle to the end of each segment's keys (its queries go on where its past ends), and knows
windows and grouped heads. (Dao, arXiv 2307.08691; PyTorch carries the kernel.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from prefillshare_train.core.layout import SegmentGroup

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_HEAD_STEP = 8  # a head's width is a multiple of this
_AMPERE = (8, 0)


@dataclass(frozen=True, slots=True)
class RaggedRow:
    """Where a packed row's segments and their keys lie.

    Attributes:
        query_ends: (segments + 1,) int32, cumulative query lengths.
        key_ends: (segments + 1,) int32, cumulative lengths of past and own keys.
        longest_query, longest_key: tokens.
        keys: (keys,) int64, rows of the concatenation of past and own K/V; None where there is no
            past, so that they are the row's own.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None


@lru_cache(maxsize=8)  # every layer of a pass asks for the same
def ragged_row(
    groups: tuple[SegmentGroup, ...], past_tokens: int, device: torch.device
) -> RaggedRow:
    """Lay out a row whose own K/V follow `past_tokens` rows of a prompt cache."""
    lengths = torch.tensor([(g.query_length, g.past_length) for g in groups for _ in g.past_starts])
    query_ends, key_ends = (
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        for counts in (lengths[:, 0], lengths.sum(1))
    )
    keys = None
    if past_tokens:
        pieces = []
        for group in groups:
            for number, start in enumerate(group.past_starts):
                own = past_tokens + group.query_start + number * group.query_length
                pieces.append(torch.arange(start, start + group.past_length))
                pieces.append(torch.arange(own, own + group.query_length))
        keys = torch.cat(pieces).to(device)
    return RaggedRow(
        query_ends.to(device),
        key_ends.to(device),
        int(lengths[:, 0].max()),
        int(lengths.sum(1).max()),
        keys,
    )


def flash_can_run(query: Tensor, value: Tensor, sinks: Tensor | None) -> bool:
    """Whether `attend_row` takes these; SDPA takes everything."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and sinks is None
        and value.dtype in _HALF
        and width == value.shape[-1]
        and width <= _LARGEST_HEAD
        and width % _HEAD_STEP == 0
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= _AMPERE
    )


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: tuple[SegmentGroup, ...],
    past: tuple[Tensor, Tensor] | None,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """`kernels.attend_segments` for what `flash_can_run` accepts; shapes are the same.

    Queries and keys are taken in the dtype of the values (under autocast RoPE may have left them in
    float32).
    """
    past_tokens = past[0].shape[1] if past is not None else 0
    row = ragged_row(groups, past_tokens, query.device)
    own = [t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value)]  # (T, heads, D)
    queries, keys, values = own
    if past is not None and row.keys is not None:
        keys, values = (
            torch.cat([held.transpose(0, 1).to(value.dtype), new]).index_select(0, row.keys)
            for held, new in zip(past, (keys, values), strict=True)
        )
    output: Tensor = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        row.query_ends,
        row.key_ends,
        row.longest_query,
        row.longest_key,
        dropout,
        True,  # causal, from the last key backwards
        False,
        scale=scaling,
        window_size_left=None if sliding_window is None else sliding_window - 1,
        window_size_right=None if sliding_window is None else 0,
    )[0]
    return output.unsqueeze(0)
