"""Agent sessions: several decoders called in turn over one growing context.

Lengths and tokens are drawn from a seed alone: session k is the same whatever the mode, the rate,
the concurrency and the number of sessions, so that two systems can be given the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.lengths import BUILT_IN, Lengths

TokenIds = tuple[int, ...]

# What an agent loop writes between two calls, such as "\nThought 2:", in tokens.
CUE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Response:
    """Stands in a prompt for the response of an earlier turn (an index) of the same session."""

    turn: int


Piece = TokenIds | Response


@dataclass(frozen=True)
class Turn:
    """One call of a session.

    Attributes:
        decoder: who is called.
        prompt: the pieces of the whole prompt, in order.
        max_tokens: length of the response; it never ends earlier.
        scripted: `max_tokens` tokens that stand for the response in later prompts where the
            context is fixed.
        messages: the prompt as chat messages in place of `prompt` (replayed traces).
        not_before_s: seconds after the session's start before which the turn must not begin.
    """

    decoder: str
    prompt: tuple[Piece, ...]
    max_tokens: int
    scripted: TokenIds = ()
    messages: tuple[dict[str, Any], ...] | None = None
    not_before_s: float = 0.0

    def prompt_ids(self, responses: Sequence[TokenIds]) -> TokenIds:
        """The prompt's token ids.

        Args:
            responses: of the session's turns so far.
        """
        return tuple(
            token
            for piece in self.prompt
            for token in (responses[piece.turn] if isinstance(piece, Response) else piece)
        )


@dataclass(frozen=True)
class Session:
    """The calls of one agent session, each made when the one before has ended.

    Attributes:
        name: unique in a workload.
        turns: in order.
        at_s: when it arrives, in seconds from the start of the load.
    """

    name: str
    turns: tuple[Turn, ...]
    at_s: float = 0.0

    def prompts(self) -> list[TokenIds]:
        """Every turn's prompt under a fixed context."""
        scripted = [turn.scripted for turn in self.turns]
        return [turn.prompt_ids(scripted) for turn in self.turns]

    @property
    def tokens(self) -> int:
        """Tokens of its longest turn, response included."""
        prompts = zip(self.prompts(), self.turns, strict=True)
        return max(len(prompt) + turn.max_tokens for prompt, turn in prompts)


@dataclass(frozen=True)
class SessionPlan:
    """What sessions are drawn from.

    Attributes:
        kind: `react`: thought, action, observation, step after step; each step is two calls, as in
            Reflexion's reference agents. `reflexion`: ReAct trials, after each an evaluator's call
            and before the next a self-reflection, whose text the next trial's context begins with
            (so that it starts anew from the system prompt). `uniform`: `calls` calls over a
            context of `context_tokens`, each response of `response_tokens`.
        decoders: called in turn, the first first; call k of a session goes to decoder k modulo
            their number.
        vocabulary: token ids to draw from.
        lengths: see `Lengths`.
        system_tokens: system prompt, tool list and examples, the same in every session.
        context_tokens: further tokens of a session's own that its context begins with (a document
            or a repository); the whole prompt of `uniform` sessions.
        trials: of `reflexion`.
        calls, response_tokens: of `uniform`.
        seed: of everything drawn.
        header: tokens that open an answer, with which every prompt then ends.
    """

    kind: str
    decoders: tuple[str, ...]
    vocabulary: TokenIds
    lengths: Lengths = BUILT_IN
    system_tokens: int = 512
    context_tokens: int = 0
    trials: int = 2
    calls: int = 8
    response_tokens: int = 32
    seed: int = 0
    header: TokenIds = ()

    def __post_init__(self) -> None:
        if self.kind not in _BUILDERS:
            raise WorkloadError(f"workload {self.kind!r} is none of {', '.join(_BUILDERS)}")
        if not self.decoders or not self.vocabulary:
            raise WorkloadError("a workload needs at least one decoder and one token id")
        if min(self.system_tokens, self.context_tokens) < 0 or self.trials < 1 or self.calls < 1:
            raise WorkloadError("tokens must be 0 or more; trials and calls 1 or more")

    def sessions(self, count: int, *, first: int = 0) -> list[Session]:
        """Sessions `first` to `first + count - 1`, all arriving at 0."""
        system = _Draw(self, np.random.default_rng([self.seed, 0])).tokens(self.system_tokens)
        build = _BUILDERS[self.kind]
        return [
            build(
                self, f"{self.kind}-{number}", system, np.random.default_rng([self.seed, 1, number])
            )
            for number in range(first, first + count)
        ]


def poisson_arrivals(
    sessions: Sequence[Session], sessions_per_s: float | None, seed: int
) -> list[Session]:
    """The sessions with Poisson arrivals.

    The pattern depends on the seed alone and is stretched by the rate.

    Args:
        sessions_per_s: None lets all arrive at once.
    """
    if sessions_per_s is None:
        return [replace(session, at_s=0.0) for session in sessions]
    if sessions_per_s <= 0:
        raise WorkloadError(f"sessions per second must be above 0, found {sessions_per_s}")
    gaps = np.random.default_rng([seed, 2]).exponential(size=len(sessions))
    times = np.cumsum(gaps) / sessions_per_s
    return [replace(s, at_s=float(t)) for s, t in zip(sessions, times, strict=True)]


@dataclass
class _Draw:
    plan: SessionPlan
    generator: np.random.Generator

    def tokens(self, count: int) -> TokenIds:
        vocabulary = self.plan.vocabulary
        return tuple(vocabulary[i] for i in self.generator.integers(len(vocabulary), size=count))


@dataclass
class _Script:
    """A session being written: the context so far, and the calls made."""

    plan: SessionPlan
    draw: _Draw
    context: list[Piece]
    turns: list[Turn] = field(default_factory=list)

    def call(self, response_tokens: int) -> Response:
        """Let the next decoder answer; its response becomes part of the context."""
        self.context.append(self.draw.tokens(CUE_TOKENS) + self.plan.header)
        number = len(self.turns)
        decoder = self.plan.decoders[number % len(self.plan.decoders)]
        scripted = self.draw.tokens(response_tokens)
        self.turns.append(Turn(decoder, tuple(self.context), response_tokens, scripted))
        response = Response(number)
        self.context.append(response)
        return response

    def trial(self) -> None:
        """ReAct steps; after the last action there is nothing to observe."""
        lengths, generator = self.plan.lengths, self.draw.generator
        steps = lengths.steps.draw(generator)
        for step in range(steps):
            self.call(lengths.thought.draw(generator))
            self.call(lengths.action.draw(generator))
            if step < steps - 1:
                self.context.append(self.draw.tokens(lengths.observation.draw(generator)))


def _react(
    plan: SessionPlan, name: str, system: TokenIds, generator: np.random.Generator
) -> Session:
    draw = _Draw(plan, generator)
    own = draw.tokens(plan.context_tokens + plan.lengths.question.draw(generator))
    script = _Script(plan, draw, [system, own])
    script.trial()
    return Session(name, tuple(script.turns))


def _reflexion(
    plan: SessionPlan, name: str, system: TokenIds, generator: np.random.Generator
) -> Session:
    draw = _Draw(plan, generator)
    document = draw.tokens(plan.context_tokens)
    question = draw.tokens(plan.lengths.question.draw(generator))
    script = _Script(plan, draw, [])
    reflections: list[Piece] = []
    for trial in range(plan.trials):
        # Reflexion puts the reflections between the examples and the question.
        script.context = [system, document, *reflections, question]
        script.trial()
        script.call(plan.lengths.verdict.draw(generator))
        if trial < plan.trials - 1:
            reflections.append(script.call(plan.lengths.reflection.draw(generator)))
    return Session(name, tuple(script.turns))


def _uniform(
    plan: SessionPlan, name: str, system: TokenIds, generator: np.random.Generator
) -> Session:
    draw = _Draw(plan, generator)
    script = _Script(plan, draw, [system, draw.tokens(plan.context_tokens)])
    for _ in range(plan.calls):
        script.call(plan.response_tokens)
    return Session(name, tuple(script.turns))


_BUILDERS = {"react": _react, "reflexion": _reflexion, "uniform": _uniform}
