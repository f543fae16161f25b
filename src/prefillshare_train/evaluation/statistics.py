"""Intervals and paired tests, by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927, through `scipy.stats.binomtest`)."""
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Paired:
    """McNemar's exact test of two decoders on the same items.

    Attributes:
        n: items that both answered.
        gained: wrong in the first, right in the second.
        lost: right in the first, wrong in the second.
        p_value: two-sided, of gained and lost being equally likely.
    """

    n: int
    gained: int
    lost: int
    p_value: float

    @property
    def difference(self) -> float:
        """Score of the second less that of the first."""
        return (self.gained - self.lost) / self.n


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Exact McNemar test (the binomial test of the discordant pairs).

    Args:
        first, second: verdicts on the same items in the same order, one at least.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    discordant = gained + lost
    p_value = float(binomtest(gained, discordant).pvalue) if discordant else 1.0
    return Paired(len(first), gained, lost, p_value)
