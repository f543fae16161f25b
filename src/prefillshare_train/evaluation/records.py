"""What a run has written: outputs as they come, verdicts once judged. Nothing is done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.task import EvaluationError

Record = dict[str, Any]
RUN_FILE = "run.json"


class RunFolder:
    """The folder of one evaluation.

    Layout: `run.json` (what is evaluated), `outputs/TASK.jsonl` (one line an answer, appended),
    `items/TASK/VARIANT.jsonl` (one line an answer with its verdict), `summary.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "outputs").mkdir(parents=True, exist_ok=True)

    def claim(self, part: str, settings: Record) -> None:
        """Note what a part of the run is, or check that the answers there are of the same.

        Args:
            part: such as `base`, `task gsm8k` or `decoder math`.
            settings: JSON values.

        Raises:
            EvaluationError: the folder holds answers of something else.
        """
        path = self.path / RUN_FILE
        held: Record = json.loads(path.read_text()) if path.is_file() else {}
        plain = json.loads(json.dumps(settings))
        before = held.setdefault(part, plain)
        different = [
            f"{key} is {before.get(key)!r} there, {plain.get(key)!r} now"
            for key in sorted({*before, *plain})
            if before.get(key) != plain.get(key)
        ]
        if different:
            raise EvaluationError(
                f"{path}: {part} was another when this folder's answers were made "
                f"({'; '.join(different)}). Name another --out"
            )
        write_json(path, held)

    def outputs(self, task: str) -> list[Record]:
        """The answers so far. A last line that a killed run left half-written is cut off."""
        path = self._outputs(task)
        if not path.is_file():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return _json_lines(whole)

    def add_outputs(self, task: str, records: Iterable[Record]) -> None:
        """Append answers, on disk when this returns."""
        with self._outputs(task).open("a") as file:
            file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
            file.flush()
            os.fsync(file.fileno())

    def verdicts(self, task: str, variant: str) -> dict[str, Record]:
        """Judged answers by item id."""
        path = self.path / "items" / task / f"{variant}.jsonl"
        if not path.is_file():
            return {}
        return {record["item_id"]: record for record in read_json_lines(path)}

    def write_verdicts(self, task: str, variant: str, records: Iterable[Record]) -> None:
        """Replace a variant's judged answers: complete or not at all."""
        path = self.path / "items" / task / f"{variant}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))

    def _outputs(self, task: str) -> Path:
        return self.path / "outputs" / f"{task}.jsonl"


def read_json_lines(path: Path) -> list[Record]:
    """One JSON object a line."""
    return _json_lines(path.read_bytes())


def _json_lines(content: bytes) -> list[Record]:
    # Lines of bytes end at a newline alone; those of a text also at U+2028 and the like, which
    # models say and JSON leaves as they are.
    return [json.loads(line) for line in content.splitlines()]


def write_json(path: Path, value: Any) -> None:
    """Complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Complete or not at all."""
    beside = path.with_name(f".unfinished-{path.name}")
    beside.write_text(text)
    beside.replace(path)
