"""What a workload allows by itself: the most prompt tokens that any cache could spare.

Computed from the token ids alone, with a cache that never forgets: a prompt token is spared where
some earlier request had the same tokens up to it. `shared` looks at all earlier requests,
`isolated` at those of the same decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.sessions import Session


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a load.

    Attributes:
        decoder: who answered.
        prompt_ids: the whole prompt.
        base_tokens: prompt tokens that the base supplies; None: all but the last.
        completion_tokens: response tokens.
    """

    decoder: str
    prompt_ids: tuple[int, ...]
    base_tokens: int | None
    completion_tokens: int

    @property
    def base_prompt(self) -> Sequence[int]:
        """The prompt tokens that the base supplies."""
        return self.prompt_ids[: -1 if self.base_tokens is None else self.base_tokens]


@dataclass(frozen=True)
class Work:
    """Token counts of a load with a cache that never forgets.

    Attributes:
        base_tokens: prompt tokens that the base supplies.
        prefill_tokens: those of them that it has to run.
        decode_tokens: response tokens.
    """

    base_tokens: int
    prefill_tokens: int
    decode_tokens: int

    @property
    def hit_ratio(self) -> float:
        """Share of the base's prompt tokens that were there: the most that can be reached."""
        return 1 - self.prefill_tokens / self.base_tokens if self.base_tokens else 0.0

    def seconds(self, prefill_s: float, decode_s: float) -> float:
        """Work at measured seconds for each prefilled and each decoded token."""
        return self.prefill_tokens * prefill_s + self.decode_tokens * decode_s


def work_of(sent: Iterable[Sent], mode: Mode, before: Iterable[Sent] = ()) -> Work:
    """Count a load's work; the order of its requests does not change the sums.

    Args:
        sent: the load's requests.
        before: requests that were served earlier (a warm-up): they leave tokens, and do not count.
    """
    caches: dict[str, _Prefixes] = {}

    def new_tokens(request: Sent) -> int:
        owner = request.decoder if mode == "isolated" else ""
        return caches.setdefault(owner, _Prefixes()).add(request.base_prompt)

    for request in before:
        new_tokens(request)
    base = prefill = decode = 0
    for request in sent:
        base += len(request.base_prompt)
        prefill += new_tokens(request)
        decode += request.completion_tokens
    return Work(base, prefill, decode)


def requests_of(sessions: Iterable[Session]) -> list[Sent]:
    """The requests of sessions under a fixed context, before any load is run."""
    return [
        Sent(turn.decoder, prompt, None, turn.max_tokens)
        for session in sessions
        for turn, prompt in zip(session.turns, session.prompts(), strict=True)
    ]


def speed_bound(shared: Work, isolated: Work, prefill_s: float, decode_s: float) -> float:
    """How much faster sharing can be: isolated work over shared work, at measured rates.

    Memory pressure, which adds repeated prefills to the isolated side, is left out.
    """
    return isolated.seconds(prefill_s, decode_s) / shared.seconds(prefill_s, decode_s)


class _Prefixes:
    """A trie of token ids."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}

    def add(self, tokens: Sequence[int]) -> int:
        """Insert, and count the tokens that were not there."""
        nodes, node = self._nodes, 0
        known = len(nodes)
        for token in tokens:
            node = nodes.setdefault((node, token), len(nodes) + 1)
        return len(nodes) - known
