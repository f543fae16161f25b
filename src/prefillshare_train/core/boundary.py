"""Who runs which prompt token.

A prompt has n tokens. The base supplies K/V for positions `[0, n - h)`; the decoder runs the last
h prompt tokens itself, and then the response. h is at least 1, because the first response token is
predicted from the last prompt token, and the base's own logits are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Kind = Literal["last_token", "generation_prompt", "block_aligned", "ratio"]
_FORMS = "last_token, generation_prompt, block_aligned:B (B >= 1), ratio:r (0 <= r <= 1)"


@dataclass(frozen=True, slots=True)
class BoundaryRule:
    """How many prompt positions the base supplies.

    Attributes:
        kind: `last_token` (h = 1, what an engine that receives a whole-prompt cache does),
            `generation_prompt` (h = length of the assistant header), `block_aligned` (whole blocks
            of `block_size` tokens from the base), or `ratio` (the first `floor(ratio * n)`).
        block_size: tokens in a block, for `block_aligned`.
        ratio: the sharing ratio in `[0, 1]`, for `ratio`. Kept exact, as a fraction of the decimal
            that was written, so that `ratio:0.29` of 100 tokens is 29 and not 28.
    """

    kind: Kind
    block_size: int | None = None
    ratio: Fraction | None = None

    @classmethod
    def parse(cls, text: str) -> BoundaryRule:
        """Read a rule as recipes and contracts write it.

        Raises:
            ValueError: the text is none of the known forms.
        """
        name, _, argument = text.strip().partition(":")
        try:
            if name in ("last_token", "generation_prompt") and not argument:
                return cls(name)  # type: ignore[arg-type]
            if name == "block_aligned" and int(argument) >= 1:
                return cls("block_aligned", block_size=int(argument))
            if name == "ratio" and 0 <= Fraction(argument) <= 1:
                return cls("ratio", ratio=Fraction(argument))
        except (ValueError, ZeroDivisionError):
            pass
        raise ValueError(f"boundary rule {text!r} is not one of: {_FORMS}")

    def __str__(self) -> str:
        if self.kind == "block_aligned":
            return f"block_aligned:{self.block_size}"
        if self.kind == "ratio":
            assert self.ratio is not None
            decimal = f"{float(self.ratio):g}"
            # A ratio that six digits do not hold is written as the fraction that it is.
            return f"ratio:{decimal if Fraction(decimal) == self.ratio else self.ratio}"
        return self.kind

    def base_length(self, prompt_length: int, header_length: int = 0) -> int:
        """Number of prompt positions whose K/V come from the base, in `[0, prompt_length - 1]`.

        Args:
            prompt_length: n, tokens in the prompt.
            header_length: tokens of the assistant header at the prompt's end; only read by
                `generation_prompt`.

        Raises:
            ValueError: the prompt is empty, or `generation_prompt` is asked of a prompt that has
                no assistant header.
        """
        if prompt_length < 1:
            raise ValueError("a prompt needs at least one token")
        if self.kind == "last_token":
            return prompt_length - 1
        if self.kind == "generation_prompt":
            if header_length < 1:
                raise ValueError(
                    "the boundary rule generation_prompt needs a template with an assistant "
                    "header; this prompt has none. Use last_token, or a template that has one"
                )
            return prompt_length - header_length
        if self.kind == "block_aligned":
            assert self.block_size is not None
            return (prompt_length - 1) // self.block_size * self.block_size
        assert self.ratio is not None
        return min(math.floor(self.ratio * prompt_length), prompt_length - 1)


def header_length(ids: Sequence[int], header: Sequence[int]) -> int:
    """Tokens from the last assistant header of a prompt to its end; 0 where there is none.

    Args:
        ids: the prompt.
        header: token ids that open an answer, see `data.generation_header`.
    """
    width = len(header)
    for start in range(len(ids) - width, -1, -1):
        if tuple(ids[start : start + width]) == tuple(header):
            return len(ids) - start
    return 0
