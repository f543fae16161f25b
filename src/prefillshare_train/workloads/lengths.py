"""How long the parts of agent sessions are: from recorded trajectories, or built in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.react_traces import read_trajectories

PROBABILITIES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Quantiles:
    """A distribution by its quantiles at `PROBABILITIES`, linear between them.

    Attributes:
        values: one a probability, ascending.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(PROBABILITIES) or list(self.values) != sorted(self.values):
            raise WorkloadError(
                f"quantiles at {PROBABILITIES} must be {len(PROBABILITIES)} ascending numbers, "
                f"found {self.values}"
            )

    @classmethod
    def of(cls, samples: Iterable[float]) -> Quantiles:
        """The quantiles of samples, at least one."""
        return cls(tuple(float(value) for value in np.quantile(list(samples), PROBABILITIES)))

    def draw(self, generator: np.random.Generator) -> int:
        """One value, rounded, at least 1."""
        return max(1, round(float(np.interp(generator.random(), PROBABILITIES, self.values))))


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, and steps in number, each drawn by itself.

    Attributes:
        source: where they come from, for reports.
        question: of a session's question.
        thought, action: of the two responses of a ReAct step.
        observation: of what the tool answers.
        steps: ReAct steps in a trial.
        verdict: of an evaluator's response in Reflexion.
        reflection: of a self-reflection in Reflexion.
    """

    source: str
    question: Quantiles
    thought: Quantiles
    action: Quantiles
    observation: Quantiles
    steps: Quantiles
    # No record of these lies in the traces: a verdict is one sentence, and Reflexion's prompt asks
    # for "a few sentences" of plan.
    verdict: Quantiles = Quantiles((8, 10, 12, 16, 20, 24, 32))
    reflection: Quantiles = Quantiles((40, 48, 64, 80, 96, 128, 160))


# What `lengths_from_traces` finds in 500 ReAct trajectories of FireAct and 512 of Reflexion (five
# trials of about a hundred questions), both on HotpotQA, in tokens of SmolLM2's tokenizer.
BUILT_IN = Lengths(
    "built in: quantiles of 1012 ReAct trajectories on HotpotQA",
    question=Quantiles((8, 13, 16, 21, 27, 45, 124)),
    thought=Quantiles((5, 11, 19, 24, 31, 44, 101)),
    action=Quantiles((4, 5, 7, 8, 11, 17, 97)),
    observation=Quantiles((1, 3, 34, 66, 115, 554, 1132)),
    steps=Quantiles((1, 2, 3, 3, 3, 6, 6)),
)


def lengths_from_traces(folder: Path, count_tokens: Callable[[list[str]], list[int]]) -> Lengths:
    """Lengths of the trajectories in a folder.

    Args:
        count_tokens: number of tokens of each text.

    Raises:
        WorkloadError: the folder holds no readable trajectories.
    """
    trajectories = read_trajectories(folder)
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    texts = {
        "question": [trajectory.question for trajectory in trajectories],
        "thought": [step.thought for step in steps if step.thought],
        "action": [step.action for step in steps if step.action],
        "observation": [step.observation for step in steps if step.observation],
    }
    if empty := [name for name, found in texts.items() if not found]:
        raise WorkloadError(f"{folder}: its trajectories have no {' and no '.join(empty)}")
    quantiles = {name: Quantiles.of(count_tokens(found)) for name, found in texts.items()}
    count = Quantiles.of(len(trajectory.steps) for trajectory in trajectories)
    return Lengths(f"{len(trajectories)} trajectories in {folder.name}", **quantiles, steps=count)
