"""Which prefill worker runs a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WORTHWHILE = 0.5
"""Share of a prompt that must be kept somewhere before it outweighs load. A system prompt that all
sessions share would otherwise draw every session to the first worker that ran it."""


@dataclass(frozen=True)
class Candidate:
    """A living worker as the router sees it.

    Attributes:
        number: of the worker.
        kept_tokens: prompt tokens that its cache holds.
        load_tokens: prompt tokens that it has still to run, and blocks held by responses in tokens.
    """

    number: int
    kept_tokens: int
    load_tokens: int


def draws(kept_tokens: int, prompt_tokens: int) -> bool:
    """Whether what is kept of a prompt decides where it is run."""
    return kept_tokens >= _WORTHWHILE * prompt_tokens


def choose_worker(candidates: Sequence[Candidate], prompt_tokens: int, affinity: int | None) -> int:
    """Longest kept prefix, then the session's worker, then the least loaded.

    Args:
        candidates: living workers, one at least.
        prompt_tokens: prompt tokens that the base supplies.
        affinity: the worker that ran the session's last turn, or None.
    """

    def rank(candidate: Candidate) -> tuple[int, bool, int, int]:
        kept = candidate.kept_tokens
        if not draws(kept, prompt_tokens):
            kept = 0
        return (-kept, candidate.number != affinity, candidate.load_tokens, candidate.number)

    return min(candidates, key=rank).number
