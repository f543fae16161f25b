"""What a run has written: outputs as they come, verdicts once judged. Nothing is done twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.task import EvaluationError

Record = dict[str, Any]
RUN_FILE = "run.json"
_FIX = "Restore it, or evaluate into another --out"


class RunFolder:
    """The folder of one evaluation.

    Layout: `run.json` (what is evaluated), `outputs/TASK.jsonl` (one line an answer, appended),
    `items/TASK/VARIANT.jsonl` (one line an answer with its verdict: appended as it is judged, in
    the order of the items once all are), `summary.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "outputs").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only evaluation that writes here.

        Raises:
            EvaluationError: another one runs.
        """
        with (self.path / ".lock").open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationError(
                    f"{self.path}: another evaluation is writing there. Wait for its end, or name "
                    "another --out"
                ) from None
            yield

    def claim(self, part: str, settings: Record, aside: Sequence[str] = ()) -> None:
        """Note what a part of the run is, or check that the answers there are of the same.

        Args:
            part: such as `base`, `task gsm8k` or `decoder math`.
            settings: JSON values.
            aside: keys of them that may differ.

        Raises:
            EvaluationError: the folder holds answers of something else.
        """
        path = self.path / RUN_FILE
        held = read_json(path) if path.is_file() else {}
        plain = json.loads(json.dumps(settings))
        before = held.setdefault(part, plain)
        different = [
            f"{key} is {before.get(key)!r} there, {plain.get(key)!r} now"
            for key in sorted({*before, *plain})
            if key not in aside and before.get(key) != plain.get(key)
        ]
        if different:
            raise EvaluationError(
                f"{path}: {part} was another when this folder's answers were made "
                f"({'; '.join(different)}). Name another --out"
            )
        write_json(path, held)

    def outputs(self, task: str, needed: Sequence[str] = ()) -> list[Record]:
        """The answers so far. A last line that a killed run left half-written is cut off.

        Raises:
            EvaluationError: a line is not a JSON object with the keys `needed`.
        """
        return _read_appended(self._outputs(task), needed)

    def add_outputs(self, task: str, records: Iterable[Record]) -> None:
        """Append answers, on disk when this returns."""
        _append(self._outputs(task), records)

    def verdicts(
        self, task: str, variant: str, needed: Sequence[str] = ("item_id",)
    ) -> dict[str, Record]:
        """Judged answers by item id, in the order of the file; half a last line is cut off.

        Raises:
            EvaluationError: a line is not a JSON object with the keys `needed`.
        """
        found = _read_appended(self._verdicts(task, variant), needed)
        return {record["item_id"]: record for record in found}

    def add_verdicts(self, task: str, variant: str, records: Iterable[Record]) -> None:
        """Append judged answers, on disk when this returns."""
        path = self._verdicts(task, variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, records)

    def write_verdicts(self, task: str, variant: str, records: Iterable[Record]) -> None:
        """Replace a variant's judged answers: complete or not at all."""
        path = self._verdicts(task, variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _lines(records))

    def _outputs(self, task: str) -> Path:
        return self.path / "outputs" / f"{task}.jsonl"

    def _verdicts(self, task: str, variant: str) -> Path:
        return self.path / "items" / task / f"{variant}.jsonl"


def require(where: str, value: Any, keys: Sequence[str]) -> Record:
    """What was read from a file, where it is a JSON object with these keys.

    Raises:
        EvaluationError: it is not; the message begins with `where`.
    """
    if not isinstance(value, dict):
        raise EvaluationError(f"{where}: found {type(value).__name__}, expected an object. {_FIX}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise EvaluationError(
            f"{where}: {', '.join(missing)} missing, found {', '.join(value) or 'nothing'}. {_FIX}"
        )
    return value


def read_json(path: Path, needed: Sequence[str] = ()) -> Record:
    """A file that holds one JSON object.

    Raises:
        EvaluationError: it does not, or lacks one of the keys `needed`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON ({error}). {_FIX}") from error
    return require(str(path), value, needed)


def read_json_lines(path: Path, needed: Sequence[str] = ()) -> list[Record]:
    """One JSON object a line.

    Raises:
        EvaluationError: a line is none, or lacks one of the keys `needed`.
    """
    found = []
    # Lines of bytes end at a newline alone; those of a text also at U+2028 and the like, which
    # models say and JSON leaves as they are.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{where}: not JSON ({error}). {_FIX}") from error
        found.append(require(where, value, needed))
    return found


def _read_appended(path: Path, needed: Sequence[str]) -> list[Record]:
    """Lines of a file that is appended to; half of one, which a kill leaves, is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_json_lines(path, needed)


def _append(path: Path, records: Iterable[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path: Path, value: Any) -> None:
    """Complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Complete or not at all."""
    beside = path.with_name(f".unfinished-{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
