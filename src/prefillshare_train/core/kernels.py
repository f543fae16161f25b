"""Attention over packed segments, as plain tensor operations.

Three routes to the same numbers. On CUDA in half precision a row is one FlashAttention call (see
`flash`). Else each group of segments is one call of `scaled_dot_product_attention` with an explicit
mask on accelerators, and on CPU for a chunk of a prompt after a longer past. Else on CPU the
queries are taken in blocks and run as batched matrix products: keys that a block cannot see are
never multiplied, query heads that share a K/V head are folded into one product, and no gradient is
computed for the prompt cache. `benchmarks/attention.py` has them side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefillshare_train.core.flash import attend_row, flash_can_run
from prefillshare_train.core.layout import SegmentGroup

_QUERY_BLOCK = 64  # queries a block on CPU; the best over both dtypes in benchmarks/attention.py
_MASKED_QUERIES = 512  # their mask over all keys is what a longer chunk's memory would go to


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: tuple[SegmentGroup, ...],
    past: tuple[Tensor, Tensor] | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every segment of a packed row over its past and itself.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D), the row's own.
        groups: how the row divides into segments; together they cover `[0, T)`.
        past: keys and values of the prompt cache, each (H_kv, P, D); constants.
        sliding_window: a query sees keys at distance < this many positions; None for all.
        sinks: (H,), one extra logit a head that takes part in the softmax and has no value.

    Returns:
        (1, T, H, D).
    """
    if flash_can_run(query, value, sinks):
        return attend_row(
            query,
            key,
            value,
            groups,
            past,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
        )
    outputs = []
    for group in groups:
        rows = slice(group.query_start, group.query_end)
        own = [_split(t[0, :, rows], group.count) for t in (query, key, value)]
        group_past = None
        if past is not None and group.past_length:
            group_past = (_gather_past(past[0], group), _gather_past(past[1], group))
        blocks = query.device.type == "cpu" and not _mostly_past(group, sliding_window)
        route = _attend_blocks if blocks else _attend_sdpa
        output = route(own[0], own[1], own[2], group_past, scaling, dropout, sliding_window, sinks)
        # (H, G, n, D) -> (G * n, H, D)
        outputs.append(output.permute(1, 2, 0, 3).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _mostly_past(group: SegmentGroup, window: int | None) -> bool:
    """Whether a short forward pass alone runs over so many keys that a mask hides few of them."""
    own = (group.query_end - group.query_start) // group.count
    short = own <= min(_MASKED_QUERIES, group.past_length)
    return short and window is None and not torch.is_grad_enabled()


def _split(rows: Tensor, count: int) -> Tensor:
    """(heads, G * n, D) -> (heads, G, n, D)."""
    return rows.unflatten(1, (count, -1))


def _gather_past(cache: Tensor, group: SegmentGroup) -> Tensor:
    """(H_kv, P, D) -> (H_kv, G, L, D): each segment's past, a view where they lie end to end."""
    length, starts = group.past_length, group.past_starts
    first = starts[0]
    if all(start == first + i * length for i, start in enumerate(starts)):
        return cache[:, first : first + len(starts) * length].unflatten(1, (len(starts), length))
    return torch.stack([cache[:, start : start + length] for start in starts], dim=1)


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    dropout: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Blocked attention of one group. query (H, G, n, D); key, value (H_kv, G, n, D)."""
    heads, count, n, dim = query.shape
    kv_heads = key.shape[0]
    fold = heads // kv_heads
    batch = kv_heads * count
    # (H_kv, fold, G, n, D) -> (H_kv, G, fold, n, D): the queries of one K/V head side by side.
    folded = (query * scaling).unflatten(0, (kv_heads, fold)).transpose(1, 2)
    own_key, own_value = key.flatten(0, 1), value.flatten(0, 1)
    past_length = past[0].shape[2] if past is not None else 0
    if past is not None:
        past_key, past_value = (t.to(value.dtype).flatten(0, 1) for t in past)
    sink_logits = None
    if sinks is not None:
        sink_logits = sinks.view(kv_heads, 1, fold, 1).expand(-1, count, -1, -1)
        sink_logits = sink_logits.reshape(batch, fold, 1, 1)

    outputs = []
    for start in range(0, n, _QUERY_BLOCK):
        stop = min(n, start + _QUERY_BLOCK)
        rows = stop - start
        block = folded[..., start:stop, :].reshape(batch, fold * rows, dim)
        own_low = 0 if window is None else max(0, start - window + 1)
        scores = torch.bmm(block, own_key[:, own_low:stop].transpose(1, 2))
        past_low = past_length
        if past is not None:
            past_low = 0 if window is None else max(0, past_length + start - window + 1)
            past_low = min(past_low, past_length)
        if past_low < past_length:
            past_scores = torch.bmm(block, past_key[:, past_low:].transpose(1, 2))
            scores = torch.cat([past_scores, scores], dim=2)
        scores = scores.view(batch, fold, rows, -1)
        first_key = past_low if past_low < past_length else past_length + own_low
        _hide_keys(scores, past_length + start, first_key, window)
        weights = _softmax(scores, sink_logits).flatten(1, 2)
        if dropout:
            weights = F.dropout(weights, dropout)
        seen = past_length - past_low
        output = torch.bmm(weights[..., seen:], own_value[:, own_low:stop])
        if seen:
            output = torch.baddbmm(output, weights[..., :seen], past_value[:, past_low:])
        outputs.append(output.view(batch, fold, rows, dim))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.unflatten(0, (kv_heads, count)).transpose(1, 2).flatten(0, 1)


def _hide_keys(scores: Tensor, first_query: int, first_key: int, window: int | None) -> None:
    """Hide future keys, and keys that left the window, of a block of consecutive positions.

    scores: (batch, fold, rows, keys); row i is position `first_query + i`, column j position
    `first_key + j`. Written in place and outside autograd: the softmax that follows has weight 0,
    and so gradient 0, wherever a score is -inf, so that recording the fill would change nothing.
    """
    rows, columns = scores.shape[-2:]
    raw = scores.detach()
    i = torch.arange(rows, device=scores.device)[:, None]
    if window is not None:
        j = torch.arange(columns, device=scores.device)[None, :] + (first_key - first_query)
        raw.masked_fill_((j > i) | (i - j >= window), float("-inf"))
    elif rows > 1:
        last_open = first_query - first_key  # the column that row 0 sees last
        j = torch.arange(columns - last_open, device=scores.device)[None, :]
        raw[..., last_open:].masked_fill_(j > i, float("-inf"))


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over keys; a sink takes its share of the mass and is then dropped."""
    if sink_logits is None:
        return torch.softmax(scores, dim=-1)
    sink = sink_logits.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    dropout: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """One SDPA call for one group. Shapes as in `_attend_blocks`."""
    past_length = 0
    if past is not None:
        past_length = past[0].shape[2]
        key = torch.cat([past[0].to(key.dtype), key], dim=2)
        value = torch.cat([past[1].to(value.dtype), value], dim=2)
    n = query.shape[2]
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    plain_causal = past_length == 0 and (window is None or window >= n)
    mask = None
    if not plain_causal or sinks is not None:
        i = torch.arange(past_length, past_length + n, device=query.device)[:, None]
        j = torch.arange(past_length + n, device=query.device)[None, :]
        mask = (j <= i) if window is None else (j <= i) & (i - j < window)
        mask = mask[None, None]
    return masked_attention(q, k, v, mask, scaling, dropout, sinks).permute(2, 0, 1, 3)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """SDPA with a boolean mask, grouped query heads and optional sinks.

    Args:
        query: (B, H, T, D).
        key, value: (B, H_kv, S, D).
        mask: boolean, broadcastable to (B, 1, T, S), True where a query may look; None means
            causal, which is only defined here for T = S or T = 1.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: no mask, and more keys than queries: SDPA would align the causal triangle to the
            wrong corner without saying so.
    """
    length = query.shape[2]
    if mask is None and length not in (1, key.shape[2]):
        raise ValueError(
            f"{length} queries over {key.shape[2]} keys need an explicit mask; "
            "without one the causal triangle would be aligned to the wrong end"
        )
    causal = mask is None and length > 1
    if sinks is not None:
        mask = _sink_bias(query, key, mask, sinks)
        causal = False
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    if length == 1 and query.shape[1] != key.shape[1]:
        return _one_query(query, key, value, mask, scaling, dropout)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # No fused CUDA kernel takes these with grouped heads: SDPA would write all scores out.
        key, value = (repeat_heads(t, query.shape[1]) for t in (key, value))
        grouped = False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2)


def repeat_heads(rows: Tensor, heads: int) -> Tensor:
    """(B, H_kv, S, D) -> (B, H, S, D): each K/V head once for each query head that reads it."""
    return rows.repeat_interleave(heads // rows.shape[1], dim=1)


def _one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """A decoding step, with the query heads of one K/V head taken as its queries.

    `enable_gqa` copies K and V out to every query head on CPU; benchmarks/attention.py has both.
    """
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    folded = query.view(batch, kv_heads, heads // kv_heads, width)
    if mask is not None and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, -1)
    output = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, width)


def _sink_bias(query: Tensor, key: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """An additive mask with one more column that holds each head's sink logit.

    The matching key and value are zero, so the column contributes exp(sink) to the softmax's
    denominator and nothing to the output: gpt-oss's attention sink.
    """
    n, m = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()[None, None]
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~mask, float("-inf"))
    bias = bias.expand(query.shape[0], query.shape[1], n, m)
    column = sinks.to(query.dtype).view(1, -1, 1, 1).expand(query.shape[0], -1, n, 1)
    return torch.cat([bias, column], dim=-1)
