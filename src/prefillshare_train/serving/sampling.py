"""Picking tokens, each row by its own request's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

_GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: logits divided by them overflow."""


class TokenPicker:
    """One response's rules, with its own random generator.

    A response drawn with a seed is the same whatever it shared a batch with.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.logprobs = params.logprobs
        self.greedy = params.temperature < _GREEDY_BELOW
        self.processors = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self.processors.append(
                RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            )
        if not self.greedy:
            if params.temperature != 1:
                self.processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                self.processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self.processors.append(TopPLogitsWarper(float(params.top_p)))
            if params.min_p:
                self.processors.append(MinPLogitsWarper(float(params.min_p)))
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


def pick_token(
    logits: Tensor, most_likely: int, picker: TokenPicker, history: Callable[[], Sequence[int]]
) -> tuple[int, TokenLogprob | None]:
    """Next token of one row.

    Args:
        logits: (V,) float32.
        most_likely: their arg-max.
        history: gives prompt and response so far, for rules that need them.

    Returns:
        The token, and where asked for its log-probability (of the raw logits).
    """
    token = most_likely if picker.plain else picker.pick(logits, history())
    if picker.logprobs is None:
        return token, None
    return token, _logprob(logits, token, picker.logprobs)


def _logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    scores = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = scores.topk(min(alternatives, scores.shape[0]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(scores[token]), top)
