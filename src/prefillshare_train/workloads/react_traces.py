"""Reader of ReAct trajectories: FireAct's fine-tuning file and Reflexion's trial logs.

A folder may hold `hotpotqa.json` (a list of rows whose `instruction` is the question and whose
`output` is the trajectory) and logs `*100q.txt` (questions, each with its numbered steps). Both
write a step as `Thought`, `Action` and `Observation` lines; an observation may run over lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefillshare_train.workloads.errors import WorkloadError

JSON_NAME = "hotpotqa.json"
LOG_PATTERN = "*100q.txt"
_MARKER = re.compile(r"^(Question|Thought|Action|Observation|Correct answer)(?: \d+)?: ?", re.M)
_LOG_RULE = re.compile(r"^(#{5,}|-{5,} BEGIN .*|BEGIN TRIAL .*|Trial summary: .*)$", re.M)


@dataclass(frozen=True, slots=True)
class Step:
    """One ReAct step. `observation` is empty in the step that ends a trajectory."""

    thought: str
    action: str
    observation: str


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A question and the steps that were taken for it."""

    question: str
    steps: tuple[Step, ...]


def read_trajectories(folder: Path) -> list[Trajectory]:
    """All trajectories of a folder.

    Raises:
        WorkloadError: the folder holds neither file, or one that is not as expected; the message
            names file and row.
    """
    found: list[Trajectory] = []
    path = folder / JSON_NAME
    logs = sorted(folder.glob(LOG_PATTERN)) if folder.is_dir() else []
    if path.is_file():
        found += _read_json(path)
    for log in logs:
        found += _read_log(log)
    if not path.is_file() and not logs:
        raise WorkloadError(
            f"{folder}: neither {JSON_NAME} nor {LOG_PATTERN} is there. Give a folder that has "
            "one, or leave it out to use the built-in lengths"
        )
    return found


def _read_json(path: Path) -> Iterator[Trajectory]:
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise WorkloadError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise WorkloadError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise WorkloadError(f"{where}: expected an object, found {type(row).__name__}")
        for key in ("instruction", "output"):
            if not isinstance(row.get(key), str):
                raise WorkloadError(f"{where}: {key!r} must be a text, found {row.get(key)!r:.60}")
        yield Trajectory(row["instruction"].strip(), _steps(_fields(row["output"]), where))


def _read_log(path: Path) -> Iterator[Trajectory]:
    question: str | None = None
    fields: list[tuple[str, str]] = []
    number = 0
    for name, text in [*_fields(_LOG_RULE.sub("", path.read_text())), ("Question", "")]:
        if name == "Question":
            if question is not None:
                yield Trajectory(question, _steps(fields, f"{path}, question {number}"))
                number += 1
            question, fields = text, []
        elif name != "Correct answer":
            fields.append((name, text))
    if number == 0:
        raise WorkloadError(f"{path}: no line begins with 'Question:'")


def _fields(text: str) -> list[tuple[str, str]]:
    """The marked parts of a text, in order; each runs to the next marker."""
    marks = list(_MARKER.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    return [
        (mark.group(1), text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]


def _steps(fields: list[tuple[str, str]], where: str) -> tuple[Step, ...]:
    """Group fields into steps.

    A trajectory that was cut off ends in the middle of a step: what is there of it counts. What is
    observed after the action that finishes is not read by anyone and left out.
    """
    steps: list[dict[str, str]] = []
    for name, text in fields:
        key = name.lower()
        if key == "thought" or not steps:
            steps.append({})
        steps[-1][key] = text
    if not steps or "thought" not in steps[0]:
        raise WorkloadError(f"{where}: expected steps of Thought, Action and Observation")
    last = len(steps) - 1
    return tuple(
        Step(
            step.get("thought", ""),
            step.get("action", ""),
            step.get("observation", "") if number < last else "",
        )
        for number, step in enumerate(steps)
    )
