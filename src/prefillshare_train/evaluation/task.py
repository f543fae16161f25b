"""What a benchmark is to the evaluator: items to answer, and a judge of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefillshare_train.data import Message, Tool

MACHINE_SETTINGS = ("sandbox", "workers")
"""Settings of a task that tell how a machine judged, and are no matter for a verdict."""


class EvaluationError(ValueError):
    """An evaluation cannot be run; the message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One prompt to answer.

    Attributes:
        item_id: unique inside its task, and the same in every run.
        messages: the conversation up to the answer; rendered by the decoders' own template.
        tools: tool specifications that the template may show, in the form of `Row.tools`.
        response_prefix: text that the answer is made to begin with. It belongs to the prompt (the
            base prefills it) and is not in the output.
        stop: strings that end an answer; the first of them and what follows is cut off.
        max_new_tokens: the longest answer in tokens.
        reference: what the judge needs, as JSON values.
    """

    item_id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None = None
    response_prefix: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 512
    reference: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says of one answer.

    Attributes:
        correct: whether it counts as right.
        extracted: the part of the output that was judged (a number, a program, calls as JSON).
        detail: why it is wrong, for a reader; empty where it is right.
    """

    correct: bool
    extracted: str = ""
    detail: str = ""


Judged = Callable[[EvalItem, Verdict], None]
"""Given an item and the verdict on its answer, in the order in which they become known."""


class Task(Protocol):
    """A benchmark.

    Attributes:
        name: as on the command line, such as `gsm8k`.
        settings: everything that shapes prompts and verdicts, as JSON values: harness and version,
            data file and its SHA-256, shots, prompt style, stop strings, timeouts. Written into the
            report.
        notes: facts a reader of the score must know, one sentence each.
    """

    name: str
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def items(self) -> list[EvalItem]:
        """All items in the benchmark's own order.

        Raises:
            EvaluationError: the data is missing or is not what the benchmark's is.
        """
        ...

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        """Verdicts on one answer an item, in order; `judged` is given each as it is known.

        An answer that cannot be read, crashes or runs too long is wrong, never an exception.

        Raises:
            EvaluationError: the judge itself cannot run.
        """
        ...
