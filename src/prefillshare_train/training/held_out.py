"""Held-out loss of any decoder over any base, outside a trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from prefillshare_train.core.attention import JOB_KEYWORD, AttentionJob
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import (
    PrefillModule,
    attach_loss_head,
    causal_lm_of,
    evaluating,
)
from prefillshare_train.core.packing import pack, placed
from prefillshare_train.core.spans import Conversation


@torch.no_grad()
def held_out_loss(
    decoder: nn.Module,
    conversations: Sequence[Conversation],
    *,
    prefill: PrefillModule | None,
    rule: BoundaryRule,
    batch_size: int = 8,
    description: str = "held-out loss",
) -> float:
    """Mean negative log-likelihood in nats of all target tokens.

    Args:
        prefill: the base whose cache the decoder reads; None has the decoder run whole prompts.
    """
    attach_loss_head(decoder)
    method = "full_prompt" if prefill is None else "prefillshare"
    ordered = sorted(conversations, key=lambda c: len(c.token_ids))
    nll, tokens = 0.0, 0
    starts = range(0, len(ordered), batch_size)
    device = causal_lm_of(decoder).device
    with evaluating(decoder):
        for start in tqdm(starts, desc=description, unit="batch", leave=False):
            rows = ordered[start : start + batch_size]
            batch = placed(pack(rows, rule, method), device)  # type: ignore[arg-type]
            layout = batch["layout"]
            past = None
            if prefill is not None:
                past = prefill.prefill_packed(batch)
            sums = decoder(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                target_index=batch["target_index"],
                **{JOB_KEYWORD: AttentionJob(layout.decode_groups, past=past)},
            )
            nll += float(sums["nll"])
            tokens += layout.response_tokens
    return nll / tokens
