"""Benchmarks by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.bfcl import BfclTask, Style
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


def make_tasks(
    names: Sequence[str],
    data: Path,
    *,
    bfcl_style: Style = "chat_template",
    max_new_tokens: int | None = None,
    allow_network: bool = False,
) -> list[Task]:
    """Build benchmarks.

    Args:
        names: from `NAMES`.
        data: folder with `gsm8k`, `gsm_plus`, `humaneval`, `humaneval_plus` and `bfcl_v4`.
        bfcl_style: how BFCL's functions are shown.
        max_new_tokens: the longest answer; the benchmark's own default where None.
        allow_network: judge code even where its network cannot be cut off.

    Raises:
        EvaluationError: a name is not known.
    """
    lengths: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    makers: dict[str, Callable[[], Task]] = {
        "gsm8k": lambda: LmEvalTask.from_file("gsm8k", data, **lengths),
        "gsm_plus": lambda: LmEvalTask.from_file("gsm_plus", data, **lengths),
        "humaneval": lambda: HumanEvalTask(
            data / "humaneval" / "HumanEval.jsonl.gz", allow_network=allow_network, **lengths
        ),
        "humaneval_plus": lambda: HumanEvalPlusTask(
            data / "humaneval_plus" / "HumanEvalPlus.jsonl.gz",
            allow_network=allow_network,
            **lengths,
        ),
        "bfcl_simple_python": lambda: BfclTask(
            "simple_python", data / "bfcl_v4", style=bfcl_style, **lengths
        ),
        "bfcl_multiple": lambda: BfclTask(
            "multiple", data / "bfcl_v4", style=bfcl_style, **lengths
        ),
    }
    wanted = [name.strip() for name in names if name.strip()]
    unknown = [name for name in wanted if name not in makers]
    if unknown or not wanted:
        raise EvaluationError(
            f"--tasks: {unknown[0] if unknown else 'nothing'} is not a benchmark here; known are "
            f"{', '.join(NAMES)}"
        )
    return [makers[name]() for name in dict.fromkeys(wanted)]
