"""Picking tokens, each row by its own request's rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefillshare_train.serving.api import SamplingParams, TokenLogprob


class TokenPicker:
    """One response's rules, with its own random generator.

    A response drawn with a seed is the same whatever it shared a batch with.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.logprobs = params.logprobs
        self.greedy = params.temperature == 0
        self.processors = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if not self.greedy:
            if params.temperature != 1:
                self.processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                self.processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self.processors.append(TopPLogitsWarper(params.top_p))
            if params.min_p:
                self.processors.append(MinPLogitsWarper(params.min_p))
            self.generator = torch.Generator(device)
            if params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(params.seed % (1 << 63))

    def pick(self, logits: Tensor, history: Sequence[int]) -> int:
        """Draw a token from (V,) logits, after the prompt and response so far."""
        scores = logits[None]
        if self.processors:
            ids = torch.tensor([list(history)], device=logits.device)
            scores = self.processors(ids, scores)  # type: ignore[arg-type]
        if self.greedy:
            return int(scores[0].argmax())
        weights = torch.softmax(scores[0], dim=-1)
        return int(torch.multinomial(weights, 1, generator=self.generator))

    @property
    def plain(self) -> bool:
        """Whether the arg-max is all that is asked for."""
        return self.greedy and not self.processors


def pick_tokens(
    logits: Tensor, pickers: Sequence[TokenPicker], histories: Sequence[Sequence[int]]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Next token of each row.

    Args:
        logits: (R, V) float32.
        histories: prompt and response so far of each row; read only by rules that need them.

    Returns:
        The tokens, and for rows that asked their log-probabilities (of the raw logits).
    """
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    tokens = [
        token if picker.plain else picker.pick(logits[row], histories[row])
        for row, (token, picker) in enumerate(zip(greedy, pickers, strict=True))
    ]
    entries = [
        None if picker.logprobs is None else _logprob(logits[row], tokens[row], picker.logprobs)
        for row, picker in enumerate(pickers)
    ]
    return tokens, entries


def _logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    scores = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = scores.topk(min(alternatives, scores.shape[0]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(scores[token]), top)
