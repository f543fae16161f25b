"""BFCL's own code in an environment of its own: made when first needed, then asked by files.

bfcl-eval pins versions that conflict with the other harnesses, and imports every vendor's client.
What its Python categories need is its own files and two small packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.task import EvaluationError

VERSION = "2026.3.23"
REQUIREMENTS = (f"bfcl-eval=={VERSION}", "tenacity==9.1.2", "filelock==3.20.0")
DEFAULT_ENVIRONMENT = Path(".cache") / "bfcl-env"

_CHECKER = Path(__file__).with_name("_bfcl_checker.py")
_INSTALL_SECONDS = 600
_START_SECONDS = 120
_ITEM_SECONDS = 5
_TAIL = 1500


@dataclass(frozen=True, slots=True)
class BfclEnvironment:
    """Where BFCL is installed.

    Attributes:
        folder: the virtual environment.
        python: its interpreter.
        data: the data files in the package, `BFCL_v4_*.json` and `possible_answer/`.
    """

    folder: Path
    python: Path
    data: Path


@dataclass(frozen=True, slots=True)
class Prepared:
    """What BFCL shows a model.

    Attributes:
        prompt_format: BFCL's name of the default format of its system prompt.
        system_prompt: that prompt around an empty list of functions.
        prompts: `messages` and `tools` (None in the prompting style) of each entry.
    """

    prompt_format: str
    system_prompt: str
    prompts: list[dict[str, Any]]


def ensure_environment(parent: Path = DEFAULT_ENVIRONMENT) -> BfclEnvironment:
    """BFCL's environment under `parent`, made with venv and pip where it is absent.

    It is built beside its place and moved there as a whole, so that one that is there is complete;
    of two processes that build at once the second takes the first one's.

    Raises:
        EvaluationError: it cannot be made (the message has pip's last lines) or is damaged.
    """
    folder = parent.absolute() / f"bfcl-eval-{VERSION}"
    if not folder.exists():
        _build(folder)
    found = sorted(folder.glob("lib/python*/site-packages/bfcl_eval/data"))
    python = folder / "bin" / "python"
    if not found or not python.exists():
        raise EvaluationError(
            f"{folder} is not a working environment with bfcl-eval. Delete it to have it made again"
        )
    return BfclEnvironment(folder, python, found[0])


def prepare(
    environment: BfclEnvironment, entries: Sequence[dict[str, Any]], style: str
) -> Prepared:
    """Messages and tools of BFCL entries, by BFCL's own code.

    Args:
        entries: rows of a data file.
        style: `chat_template` or `prompting`.

    Raises:
        EvaluationError: BFCL cannot read an entry.
    """
    seconds = _START_SECONDS + _ITEM_SECONDS * len(entries)
    run = _run(environment, "prepare", {"entries": list(entries), "style": style}, seconds)
    if run.ending:
        started = len(run.lines)  # the head, and an entry each
        at = f"entry {entries[started - 1]['id']!r}" if 0 < started <= len(entries) else "no entry"
        raise EvaluationError(f"BFCL's code {run.ending} at {at}:\n{run.tail}")
    head, *prompts = run.lines
    return Prepared(head["prompt_format"], head["system_prompt"], prompts)


def score(
    environment: BfclEnvironment, category: str, items: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """BFCL's verdicts: `valid`, `calls` (JSON text) and `error` of each item, in order.

    An answer that brings the checker down is wrong; the checker is started again for the rest.

    Args:
        items: `function`, `ground_truth`, and `calls` (JSON text) or `output` (text to decode).

    Raises:
        EvaluationError: the checker does not start, or fails by itself.
    """
    verdicts: list[dict[str, Any]] = []
    while len(verdicts) < len(items):
        rest = list(items[len(verdicts) :])
        seconds = _START_SECONDS + _ITEM_SECONDS * len(rest)
        run = _run(environment, "score", {"category": category, "items": rest}, seconds)
        if not run.lines or (run.ending and not run.killed):
            raise EvaluationError(f"BFCL's checker {run.ending}:\n{run.tail}")
        verdicts += run.lines[1:]
        if len(run.lines) - 1 < len(rest):
            error = f"The checker {run.ending} on this answer."
            verdicts.append({"valid": False, "calls": "", "error": error})
    return verdicts


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run of the checker left: its lines; how it ended ("" for well); its last output."""

    lines: list[dict[str, Any]]
    ending: str
    killed: bool
    tail: str


def _run(
    environment: BfclEnvironment, command: str, request: dict[str, Any], seconds: float
) -> _Run:
    """Run the checker in a fresh directory, with none of this process's environment variables."""
    with tempfile.TemporaryDirectory(prefix="bfcl-") as name:
        work = Path(name)
        asked, answered = work / "request.json", work / "answer.jsonl"
        asked.write_text(json.dumps(request), encoding="utf-8")
        arguments = [command, str(asked), str(answered)]
        try:
            done = subprocess.run(
                [environment.python, "-I", "-B", "-X", "utf8", _CHECKER, *arguments],
                cwd=work,
                # BFCL makes folders under BFCL_PROJECT_ROOT, by default beside the package.
                env={"PATH": os.defpath, "HOME": name, "TMPDIR": name, "BFCL_PROJECT_ROOT": name},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Run(_lines(answered), f"took more than {seconds:g} s", True, "")
        except OSError as error:
            raise EvaluationError(
                f"{environment.python} does not run ({error}). Delete {environment.folder} to have "
                "it made again"
            ) from error
        ending = f"ended with status {done.returncode}" if done.returncode else ""
        return _Run(_lines(answered), ending, done.returncode < 0, _tail(done.stderr))


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


def _build(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as name:
        beside = Path(name) / "env"
        _install_step(folder, [sys.executable, "-m", "venv", str(beside)])
        pip = [str(beside / "bin" / "python"), "-I", "-m", "pip", "install"]
        options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "2"]
        _install_step(folder, [*pip, *options, *REQUIREMENTS])
        try:
            beside.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _install_step(folder: Path, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        status, output = f"took more than {_INSTALL_SECONDS} s", ""
    else:
        status, output = f"ended with status {done.returncode}", done.stdout
        if done.returncode == 0:
            return
    raise EvaluationError(
        f"BFCL's environment cannot be made at {folder}: `{' '.join(command)}` {status}. It needs "
        f"pip and a package index once; try again where there is one.\n{_tail(output)}"
    )


def _tail(text: str) -> str:
    return text.strip()[-_TAIL:]
