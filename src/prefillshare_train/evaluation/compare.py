"""Finished evaluations as one table: scores with intervals, and paired tests on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.records import Record, read_json, read_json_lines, require
from prefillshare_train.evaluation.statistics import Paired, mcnemar
from prefillshare_train.evaluation.task import MACHINE_SETTINGS, EvaluationError

_TOLD = 100
_ROW_KEYS = (
    "task decoder label prefill boundary sharing_ratio variant n score ci95 contract_mismatch"
).split()
# Settings that belong to a whole row of the table: rows of one name that differ in them are two.
_ROW_SETTINGS = ("base_fingerprint", "style")
LABELS = ("base", "Full-FT", "naive", "PrefillShare")


@dataclass(frozen=True)
class Result:
    """A row of a summary, and its verdicts by item and request.

    Attributes:
        settings: what shaped the answers beside the request: the task's settings and the base's.
        base: hub id or folder of the base; its fingerprint where the summary does not tell.
        told_apart: what its name says beyond the decoder, since others of that name have another.
    """

    row: Record
    settings: Record
    verdicts: dict[tuple[str, str], bool]
    base: str
    told_apart: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The benchmark."""
        return str(self.row["task"])

    @property
    def is_of_a_curve(self) -> bool:
        """Whether it was evaluated at a sharing ratio of its own."""
        return str(self.row["boundary"]).startswith("ratio:")

    @property
    def name(self) -> str:
        """As the table calls it."""
        ratio = self.row["sharing_ratio"]
        label = str(self.row["label"])
        if self.is_of_a_curve:
            label = f"{label} at ratio {ratio:g}"
        elif label == "PrefillShare" and self.row["prefill"] == "self":
            label = f"{label} without the base's cache"
        decoder = str(self.row["decoder"])
        named = () if self.row["label"] == decoder == "base" else (decoder,)
        words = ", ".join((*named, *self.told_apart))
        return f"{label} ({words})" if words else label


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and the plots show.

    Attributes:
        results: in the table's order.
        paired: for each pair compared, its task, both names and the test.
        notes: what a reader must know.
        savings: what one prefill for all decoders saved, a sentence a run and task.
    """

    results: list[Result]
    paired: list[tuple[str, str, str, Paired]]
    notes: list[str]
    savings: list[str]

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

    Results of one name over two bases, or in two of BFCL's styles, get base or style into their
    names.

    Raises:
        EvaluationError: a folder is not a finished evaluation or is damaged, or two results have
            one name in one task.
    """
    found: list[tuple[Path, Result]] = []
    notes: dict[str, None] = {}
    savings: dict[str, None] = {}
    for run in runs:
        summary = _summary(run)
        found += [(run, result) for result in _results(run, summary)]
        for name, task in summary["tasks"].items():
            notes |= {f"{name}: {note}": None for note in task["notes"]}
        savings |= dict.fromkeys(savings_of(summary))
    told = _told_apart([result for _, result in found])
    results: list[Result] = []
    for (run, _), result in zip(found, told, strict=True):
        same = [r for r in results if (r.name, r.task) == (result.name, result.task)]
        if same and same[0].verdicts != result.verdicts:
            raise EvaluationError(
                f"{run}: {result.name} has another {result.task} result in another run; "
                "evaluate it under another name (--decoder name=DIR, or name=base)"
            )
        if not same:
            results.append(result)
    for result in results:
        if mismatch := result.row["contract_mismatch"]:
            notes[f"{result.name}: its contract does not fit. {mismatch}"] = None
    results.sort(key=lambda r: (LABELS.index(r.row["label"]), r.row["decoder"], r.told_apart))
    notes |= dict.fromkeys(_differences(results))
    return Comparison(results, _paired(results), list(notes), list(savings))


def savings_of(summary: Record) -> list[str]:
    """What one prefill for all decoders saved, a sentence a task where it saved anything."""
    return [
        f"{task}: one prefill for all decoders, so that the base ran {saved['base_tokens']:,} "
        f"prompt tokens in place of {saved['base_tokens_if_apart']:,} "
        f"({saved['saved_share']:.0%} saved)."
        for task, saved in summary.get("shared_prefill", {}).items()
        if saved["base_tokens"] < saved["base_tokens_if_apart"]
    ]


def _summary(run: Path) -> Record:
    path = run / "summary.json"
    if not path.is_file():
        raise EvaluationError(f"{run} has no summary.json: it is not a finished evaluation")
    summary = read_json(path, ("results", "tasks", "run"))
    if not summary.get("complete", True):  # earlier versions did not say
        raise EvaluationError(
            f"{path}: its last start did not finish every task. Repeat its command"
        )
    for number, row in enumerate(summary["results"]):
        where = f"{path}: results[{number}]"
        task = require(where, row, _ROW_KEYS)["task"]
        require(f"{path}: tasks", summary["tasks"], (task,))
        require(f"{path}: tasks[{task}]", summary["tasks"][task], ("settings", "notes"))
    return summary


def _results(run: Path, summary: Record) -> list[Result]:
    base = summary.get("base", {}).get("id")  # earlier versions did not say
    found = []
    for row in summary["results"]:
        settings = {**summary["tasks"][row["task"]]["settings"], **summary["run"]}
        for key in MACHINE_SETTINGS:
            settings.pop(key, None)
        named = base or str(settings.get("base_fingerprint"))
        found.append(Result(row, settings, _verdicts(run, row), named))
    return found


def _told_apart(results: Sequence[Result]) -> list[Result]:
    """The same results, told apart where those of one name differ in what makes a row."""
    found = []
    for result in results:
        words = []
        for key in _ROW_SETTINGS:
            named = [r for r in results if r.name == result.name and key in r.settings]
            if key in result.settings and len({r.settings[key] for r in named}) > 1:
                words.append(result.base if key == "base_fingerprint" else result.settings[key])
        found.append(dataclasses.replace(result, told_apart=tuple(words)))
    return found


def _verdicts(run: Path, row: Record) -> dict[tuple[str, str], bool]:
    path = run / "items" / row["task"] / f"{row['variant']}.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path} is missing: its verdicts are needed for paired tests")
    # Beyond the row's are items of an earlier start with a higher --limit.
    records = read_json_lines(path, ("item_id", "request_sha256", "correct"))[: row["n"]]
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


def _of_one_ratio(first: Result, second: Result) -> bool:
    """Curves are compared point by point; without them, naive and conditioned share alike."""
    if "naive" not in (first.row["label"], second.row["label"]):
        return True
    if not (first.is_of_a_curve or second.is_of_a_curve):
        return True
    return bool(first.row["sharing_ratio"] == second.row["sharing_ratio"])


def _paired(results: Sequence[Result]) -> list[tuple[str, str, str, Paired]]:
    found = []
    for second in results:
        for first in results:
            worth = LABELS.index(first.row["label"]) < LABELS.index(second.row["label"])
            if first.task != second.task or not worth or second.row["label"] == "naive":
                continue
            if first.settings != second.settings or not _of_one_ratio(first, second):
                continue
            shared = [key for key in first.verdicts if key in second.verdicts]
            if shared:
                test = mcnemar(
                    [first.verdicts[k] for k in shared], [second.verdicts[k] for k in shared]
                )
                found.append((second.task, first.name, second.name, test))
    return found
