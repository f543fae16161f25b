"""Log-likelihoods of continuations: the base runs each prompt once, the decoder what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prefillshare_train.core.attention import AttentionJob
from prefillshare_train.core.layout import Segment, group_segments, positions_of
from prefillshare_train.core.loss import CHUNK_TOKENS, LogitTransform
from prefillshare_train.core.modules import (
    PrefillModule,
    causal_lm_of,
    check_positions,
    evaluating,
    run_backbone,
)


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text to score.

    Attributes:
        ids: token ids of the prompt and then of what is scored.
        prompt_length: how many of them are the prompt.
        base_length: how many of them the base runs; 0 for none, less than `prompt_length`.
    """

    ids: tuple[int, ...]
    prompt_length: int
    base_length: int


@torch.no_grad()
def score_continuations(
    decoder: nn.Module, prefill: PrefillModule | None, rows: Sequence[Continuation]
) -> list[tuple[float, bool]]:
    """Score one packed batch.

    Rows whose base tokens are the same (the choices of one question) share one prefill; neighbours
    of one shape are run as one batch of attention.

    Args:
        prefill: the base; None where no row has base tokens.

    Returns:
        For each row the summed log-likelihood in nats, and whether greedy decoding would give the
        very same tokens.
    """
    model = causal_lm_of(decoder)
    starts = dict.fromkeys(row.ids[: row.base_length] for row in rows if row.base_length)
    cache = prefill.prefill(list(starts)) if prefill is not None and starts else None
    places = dict(zip(starts, cache.starts if cache is not None else (), strict=True))
    tokens: list[int] = []
    segments: list[Segment] = []
    scored: list[int] = []
    targets: list[int] = []
    for row in rows:
        offset = len(tokens) - row.base_length
        # The last token predicts nothing that is scored, so nobody runs it.
        tokens.extend(row.ids[row.base_length : -1])
        past = places.get(row.ids[: row.base_length], 0)
        segments.append(Segment(len(row.ids) - 1 - row.base_length, past, row.base_length))
        scored.extend(range(offset + row.prompt_length - 1, offset + len(row.ids) - 1))
        targets.extend(row.ids[row.prompt_length :])
    positions = positions_of(segments)
    check_positions(model.config, max(positions))
    device = model.device
    with evaluating(decoder):
        hidden = run_backbone(
            model,
            torch.tensor([tokens], device=device),
            torch.tensor([positions], device=device),
            AttentionJob(group_segments(segments), past=cache),
        )[0, torch.tensor(scored, device=device)]
        transform = LogitTransform.of(model.config)
        log_likelihoods: list[float] = []
        hits: list[bool] = []
        labels = torch.tensor(targets, device=device)
        for piece, wanted in zip(
            hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True
        ):
            logits = transform(model.get_output_embeddings()(piece))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
            log_likelihoods += chosen.tolist()
            hits += (logits.argmax(-1) == wanted).tolist()
    results = []
    start = 0
    for row in rows:
        end = start + len(row.ids) - row.prompt_length
        results.append((sum(log_likelihoods[start:end]), all(hits[start:end])))
        start = end
    return results
