"""The rows of a report: each decoder with who runs its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.evaluation.contestants import BASE, Decoder
from prefillshare_train.evaluation.task import EvaluationError

Prefill = Literal["base", "self"]


@dataclass(frozen=True)
class Variant:
    """A decoder, and how much of each prompt the base runs for it.

    Attributes:
        rule: None where the decoder runs whole prompts itself.
        sharing_ratio: share of the prompt that the rule asks of the base, 0 to 1; None for rules
            whose share depends on the prompt.
    """

    decoder: Decoder
    rule: BoundaryRule | None
    sharing_ratio: float | None

    @property
    def prefill(self) -> Prefill:
        """Who runs the prompt."""
        return "self" if self.rule is None else "base"

    @property
    def key(self) -> str:
        """A name that is good for a file."""
        how = "self" if self.rule is None else str(self.rule)
        return re.sub(r"[^\w.-]+", "_", f"{self.decoder.name}--{how}")

    @property
    def label(self) -> str:
        """`base`, `Full-FT`, `naive` or `PrefillShare`: the rows of the paper's table."""
        if self.decoder.method == BASE:
            return BASE
        if self.decoder.method == "full_prompt":
            return "Full-FT" if self.rule is None else "naive"
        return "PrefillShare"

    def base_length(self, prompt_length: int, header_length: int) -> int:
        """Prompt tokens that the base runs."""
        if self.rule is None:
            return 0
        return self.rule.base_length(prompt_length, header_length)


def variants_of(
    decoders: Sequence[Decoder], prefill: str | None, ratios: Sequence[float]
) -> list[Variant]:
    """What to evaluate.

    Args:
        prefill: who runs the prompts, `base` or `self`. Where None, the base runs them for
            conditioned decoders, as they are served; a `full_prompt` decoder runs its own, and then
            reads the base's too (naive sharing); the base runs its own.
        ratios: sharing ratios to evaluate every decoder at, in place of all that.

    Raises:
        EvaluationError: a ratio is not in [0, 1].
    """
    if ratios:
        return [_at_ratio(decoder, ratio) for decoder in decoders for ratio in ratios]
    found = []
    for decoder in decoders:
        alone = Variant(decoder, None, 0.0)
        shared = Variant(decoder, decoder.rule, _ratio_of(decoder.rule))
        if prefill == "self" or (prefill is None and decoder.method == BASE):
            found.append(alone)
        elif prefill is None and decoder.method == "full_prompt":
            found += [alone, shared]
        else:
            found.append(shared)
    return found


def _at_ratio(decoder: Decoder, ratio: float) -> Variant:
    if not 0 <= ratio <= 1:
        raise EvaluationError(f"--sharing-ratio {ratio}: must be from 0 to 1")
    rule = BoundaryRule.parse(f"ratio:{ratio}") if ratio else None
    return Variant(decoder, rule, ratio)


def _ratio_of(rule: BoundaryRule) -> float | None:
    if rule.kind == "ratio":
        assert rule.ratio is not None
        return float(rule.ratio)
    return 1.0 if rule.kind == "last_token" else None
