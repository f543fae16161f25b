"""`summary.json`: what a run found, task by task, beside what earlier starts of it found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prefillshare_train.evaluation.records import Record, read_json, require, write_json
from prefillshare_train.evaluation.task import Task


class Stopwatch:
    """Seconds that an evaluation took, over all its starts, those that were killed included.

    They are written at each answer and verdict, since a kill leaves no time for it.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / "elapsed.json"
        held = read_json(self._path, ("seconds",)) if self._path.is_file() else {"seconds": 0.0}
        self._before: float = held["seconds"]
        self._start = time.perf_counter()

    def keep(self) -> float:
        """Write the seconds so far, and return them."""
        seconds = round(self._before + time.perf_counter() - self._start, 3)
        write_json(self._path, {"seconds": seconds})
        return seconds


class Summary:
    """The summary of a folder; rows of other tasks and variants that are there stay.

    Attributes:
        path: of the file.

    Raises:
        EvaluationError: the file that is there is damaged.
    """

    def __init__(self, out: Path, stopwatch: Stopwatch) -> None:
        self.path = out / "summary.json"
        self._stopwatch = stopwatch
        self._held = read_json(self.path) if self.path.is_file() else {}
        for number, row in enumerate(self._held.get("results", [])):
            require(f"{self.path}: results[{number}]", row, ("task", "variant", "decode_seconds"))

    def add(self, task: Task, rows: Sequence[Record], answers: Sequence[Record]) -> None:
        """Put a task's rows in the place of those of the same variants.

        Args:
            answers: of every variant to the items of these rows.
        """
        held = self._held
        found = {(row["task"], row["variant"]): row for row in held.get("results", [])}
        found |= {(row["task"], row["variant"]): row for row in rows}
        held["results"] = list(found.values())
        counted = {variant for name, variant in found if name == task.name}
        saving = prefill_saving([a for a in answers if a["variant"] in counted])
        held.setdefault("shared_prefill", {})[task.name] = saving
        about = {"settings": task.settings, "notes": list(task.notes)}
        held.setdefault("tasks", {})[task.name] = about

    def write(self, about: Record, *, complete: bool) -> None:
        """Write the file: whole or not at all.

        Of its times, `wall_seconds` is what prefill and decoding of all answers took, and
        `elapsed_seconds` is all that went by from the first prompt to now, judging included; both
        over all starts.

        Args:
            about: of the run; its `contracts` are added to those that are there.
            complete: whether every task of this start has been added.
        """
        contracts = {**self._held.get("contracts", {}), **about["contracts"]}
        self._held |= {**about, "contracts": contracts, "complete": complete}
        seconds = sum(row["decode_seconds"] for row in self._held["results"])
        seconds += sum(task["prefill_seconds"] for task in self._held["shared_prefill"].values())
        times = {"wall_seconds": round(seconds, 1), "elapsed_seconds": self._stopwatch.keep()}
        write_json(self.path, {**self._held, **times})


def prefill_saving(outputs: Sequence[Record]) -> Record:
    """Prompt tokens that the base ran, and would have run decoder by decoder.

    Args:
        outputs: answers of one task.
    """
    ran: dict[tuple[str, str], int] = {}
    seconds = {}
    outputs = [record for record in outputs if "answered_in" not in record]
    for record in outputs:
        # A variant that is evaluated in a later start shares no prefill with the earlier ones.
        key = record["item_id"], record.get("prefill_id", "")
        ran[key] = max(ran.get(key, 0), record["base_tokens"])
        seconds[key] = record["prefill_seconds"]
    apart = sum(record["base_tokens"] for record in outputs)
    together = sum(ran.values())
    return {
        "base_tokens": together,
        "base_tokens_if_apart": apart,
        "saved_share": 1 - together / apart if apart else 0.0,
        "prefill_seconds": round(sum(seconds.values()), 2),
    }
