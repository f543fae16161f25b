"""From conversations to one packed batch.

Nothing is padded: a batch is one row of base tokens and one row of decoder tokens, whatever the
lengths. Each trained turn becomes one decoder segment that starts at its boundary, so every turn of
a conversation is trained in one step, each exactly as it will be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.layout import Segment, SegmentGroup, group_segments, positions_of
from prefillshare_train.core.prefill_plan import PrefillPlan, plan_prefill
from prefillshare_train.core.spans import Conversation

Method = Literal["prefillshare", "full_prompt"]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The shape of a packed batch, beside its tensors.

    Attributes:
        prompt_lengths: tokens that the base runs, one entry a conversation (0 for none).
        prefill_groups: segments of the base's row, were it run in one pass.
        prefill: the base's passes over that row.
        decode_groups: segments of the decoder's row; their past is the base's row.
        conversations: number of conversations in the batch.
        prompt_tokens: prompt tokens of all conversations, whoever runs them.
        response_tokens: tokens that carry a loss.
        max_position: largest absolute position in the batch.
        decode_pairs: query-key pairs that the decoder's attention scores (for FLOP counts).
        prefill_pairs: the same for the base.
    """

    prompt_lengths: tuple[int, ...]
    prefill_groups: tuple[SegmentGroup, ...]
    prefill: PrefillPlan
    decode_groups: tuple[SegmentGroup, ...]
    conversations: int
    prompt_tokens: int
    response_tokens: int
    max_position: int
    decode_pairs: int
    prefill_pairs: int


def pack(
    conversations: Sequence[Conversation],
    rule: BoundaryRule,
    method: Method = "prefillshare",
    *,
    share_from: int | None = None,
    chunk_tokens: int | None = None,
) -> dict[str, Any]:
    """Pack conversations into the inputs of one training step.

    Longer conversations come first and equal shapes side by side, so that attention can batch them.

    Args:
        conversations: what to train on.
        rule: who runs which prompt token; not read for `full_prompt`.
        method: `prefillshare` gives the base the prompt; `full_prompt` has the decoder run
            everything, with the same targets (ordinary supervised fine-tuning).
        share_from, chunk_tokens: how the base runs the prompts, see `plan_prefill`.

    Returns:
        A dict of `prefill_ids` and `prefill_position_ids` (1, T_base), `input_ids` and
        `position_ids` (1, T_dec), `target_index` (1, N) into the decoder's row, `labels` (1, N),
        and `layout`, a `BatchLayout`. `labels[0, i]` is the token after position
        `target_index[0, i]`: targets are already shifted. All tensors are int64.
    """
    ordered = sorted(conversations, key=_shape_key, reverse=True)
    prefill_ids: list[int] = []
    prompts: list[tuple[int, ...]] = []
    prompt_lengths: list[int] = []
    decode_ids: list[int] = []
    decode_segments: list[Segment] = []
    target_index: list[int] = []
    labels: list[int] = []
    prompt_tokens = 0
    for conversation in ordered:
        ids = conversation.token_ids
        past_start = len(prefill_ids)
        if method == "full_prompt":
            end = conversation.turns[-1].end
            stretches = [(0, end - 1, conversation.turns)]
            prompts.append(())
            prompt_lengths.append(0)
        else:
            starts = [
                rule.base_length(t.prompt_length, t.header_length) for t in conversation.turns
            ]
            stretches = [
                (start, turn.end - 1, (turn,))
                for start, turn in zip(starts, conversation.turns, strict=True)
            ]
            prompt_lengths.append(max(starts))
            prompts.append(ids[: max(starts)])
            prefill_ids.extend(prompts[-1])
        prompt_tokens += conversation.turns[-1].prompt_length
        for start, stop, turns in stretches:
            offset = len(decode_ids) - start
            # The last response token predicts nothing, so nobody runs it.
            decode_ids.extend(ids[start:stop])
            decode_segments.append(Segment(stop - start, past_start, start))
            for turn in turns:
                target_index.extend(range(turn.prompt_length - 1 + offset, turn.end - 1 + offset))
                labels.extend(ids[turn.prompt_length : turn.end])
    prefill_segments = [Segment(n) for n in prompt_lengths if n]
    plan = plan_prefill(prompts, share_from=share_from, chunk_tokens=chunk_tokens)
    positions = positions_of(decode_segments)
    layout = BatchLayout(
        prompt_lengths=tuple(prompt_lengths),
        prefill_groups=group_segments(prefill_segments),
        prefill=plan,
        decode_groups=group_segments(decode_segments),
        conversations=len(ordered),
        prompt_tokens=prompt_tokens,
        response_tokens=len(labels),
        max_position=max(positions),
        decode_pairs=_pairs(decode_segments),
        prefill_pairs=sum(_group_pairs(group) for one in plan.passes for group in one.groups),
    )
    return {
        "prefill_ids": _row(prefill_ids),
        "prefill_position_ids": _row(positions_of(prefill_segments)),
        "input_ids": _row(decode_ids),
        "position_ids": _row(positions),
        "target_index": _row(target_index),
        "labels": _row(labels),
        "layout": layout,
    }


def pack_prompts(prompts: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Any]:
    """What `PrefillModule.prefill_packed` reads of a batch, for prompts alone."""
    lengths = tuple(len(ids) for ids in prompts)
    segments = [Segment(n) for n in lengths if n]
    layout = BatchLayout(
        prompt_lengths=lengths,
        prefill_groups=group_segments(segments),
        prefill=plan_prefill(prompts),
        decode_groups=(),
        conversations=len(prompts),
        prompt_tokens=sum(lengths),
        response_tokens=0,
        max_position=max(lengths, default=1) - 1,
        decode_pairs=0,
        prefill_pairs=_pairs(segments),
    )
    batch = {
        "prefill_ids": _row([i for ids in prompts for i in ids]),
        "prefill_position_ids": _row(positions_of(segments)),
        "layout": layout,
    }
    return placed(batch, device)


def placed(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A packed batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _row(values: list[int]) -> Tensor:
    return torch.tensor([values], dtype=torch.long)


def _shape_key(conversation: Conversation) -> tuple[int, ...]:
    first = conversation.turns[0]
    return (len(conversation.turns), first.prompt_length, first.end, first.header_length)


def _pairs(segments: Sequence[Segment]) -> int:
    """Query-key pairs of causal segments, windows left out."""
    return sum(
        s.query_length * s.past_length + s.query_length * (s.query_length + 1) // 2
        for s in segments
    )


def _group_pairs(group: SegmentGroup) -> int:
    segment = Segment(group.query_length, past_length=group.past_length)
    return group.count * _pairs([segment])
