"""Finished evaluations as one table: scores with intervals, and paired tests on the same items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.records import Record, read_json_lines
from prefillshare_train.evaluation.statistics import Paired, mcnemar
from prefillshare_train.evaluation.task import EvaluationError

_TOLD = 100
LABELS = ("base", "Full-FT", "naive", "PrefillShare")


@dataclass(frozen=True)
class Result:
    """A row of a summary, and its verdicts by item and request.

    Attributes:
        settings: what shaped the answers beside the request: the task's settings and the base's.
    """

    row: Record
    settings: Record
    verdicts: dict[tuple[str, str], bool]

    @property
    def task(self) -> str:
        """The benchmark."""
        return str(self.row["task"])

    @property
    def name(self) -> str:
        """As the table calls it."""
        ratio = self.row["sharing_ratio"]
        label = str(self.row["label"])
        if self.row["boundary"] and str(self.row["boundary"]).startswith("ratio:"):
            label = f"{label} at ratio {ratio:g}"
        elif label == "PrefillShare" and self.row["prefill"] == "self":
            label = f"{label} without the base's cache"
        return label if self.row["label"] == "base" else f"{label} ({self.row['decoder']})"


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and the plots show.

    Attributes:
        results: in the table's order.
        paired: for each pair compared, its task, both names and the test.
        notes: what a reader must know.
    """

    results: list[Result]
    paired: list[tuple[str, str, str, Paired]]
    notes: list[str]

    @property
    def tasks(self) -> list[str]:
        """Benchmarks, in order."""
        return list(dict.fromkeys(result.task for result in self.results))

    @property
    def names(self) -> list[str]:
        """Rows of the table, in order."""
        return list(dict.fromkeys(result.name for result in self.results))

    def cell(self, name: str, task: str) -> Result | None:
        """One score."""
        return next((r for r in self.results if (r.name, r.task) == (name, task)), None)


def compare(runs: Sequence[Path]) -> Comparison:
    """Read finished evaluations.

    Every conditioned decoder, naive sharing and full fine-tuning is tested against the others of
    the same task that answered the same prompts: PrefillShare against Full-FT, naive and base, and
    Full-FT against base.

    Raises:
        EvaluationError: a folder is not a finished evaluation, or two results have one name in one
            task.
    """
    results: list[Result] = []
    notes: dict[str, None] = {}
    for run in runs:
        path = run / "summary.json"
        if not path.is_file():
            raise EvaluationError(f"{run} has no summary.json: it is not a finished evaluation")
        summary: dict[str, Any] = json.loads(path.read_text())
        if not summary.get("complete", True):  # earlier versions did not say
            raise EvaluationError(
                f"{path}: its last start did not finish every task. Repeat its command"
            )
        for row in summary["results"]:
            settings = {**summary["tasks"][row["task"]]["settings"], **summary["run"]}
            settings.pop("sandbox", None)  # the machine's, and no matter for a verdict
            result = Result(row, settings, _verdicts(run, row))
            same = [r for r in results if (r.name, r.task) == (result.name, result.task)]
            if same and same[0].verdicts != result.verdicts:
                raise EvaluationError(
                    f"{run}: {result.name} has another {result.task} result in another run; "
                    "evaluate it under another name (--decoder name=DIR)"
                )
            if not same:
                results.append(result)
            if row["contract_mismatch"]:
                notes[f"{result.name}: its contract does not fit. {row['contract_mismatch']}"] = (
                    None
                )
        for name, task in summary["tasks"].items():
            notes |= {f"{name}: {note}": None for note in task["notes"]}
    results.sort(key=lambda r: (LABELS.index(r.row["label"]), r.row["decoder"]))
    notes |= dict.fromkeys(_differences(results))
    return Comparison(results, _paired(results), list(notes))


def _verdicts(run: Path, row: Record) -> dict[tuple[str, str], bool]:
    path = run / "items" / row["task"] / f"{row['variant']}.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path} is missing: its verdicts are needed for paired tests")
    # Beyond the row's are items of an earlier start with a higher --limit.
    records = read_json_lines(path)[: row["n"]]
    return {(r["item_id"], r["request_sha256"]): bool(r["correct"]) for r in records}


def _differences(results: Sequence[Result]) -> list[str]:
    """A note for each two results of a task that were not made alike."""
    found = []
    for task in dict.fromkeys(result.task for result in results):
        first, *others = [result for result in results if result.task == task]
        for other in others:
            keys = {*first.settings, *other.settings}
            values = {key: (first.settings.get(key), other.settings.get(key)) for key in keys}
            words = [
                _words(key, *both) for key, both in sorted(values.items()) if both[0] != both[1]
            ]
            if words:
                found.append(
                    f"{task}: {first.name} and {other.name} were made with different settings "
                    f"({'; '.join(words)}), so they are not tested against each other."
                )
            elif not first.verdicts.keys() & other.verdicts.keys():
                found.append(
                    f"{task}: {first.name} and {other.name} have no request in common, so they "
                    "are not tested against each other."
                )
    return found


def _words(key: str, first: Any, second: Any) -> str:
    told = f"{key} {first!r} and {second!r}"
    return told if len(told) <= _TOLD else key  # templates and hashes of files are long


def _paired(results: Sequence[Result]) -> list[tuple[str, str, str, Paired]]:
    found = []
    for second in results:
        for first in results:
            worth = LABELS.index(first.row["label"]) < LABELS.index(second.row["label"])
            if first.task != second.task or not worth or second.row["label"] == "naive":
                continue
            if first.settings != second.settings:
                continue
            shared = [key for key in first.verdicts if key in second.verdicts]
            if shared:
                test = mcnemar(
                    [first.verdicts[k] for k in shared], [second.verdicts[k] for k in shared]
                )
                found.append((second.task, first.name, second.name, test))
    return found
