"""What is known about a decoder from files beside it: its evaluation and its training log."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.errors import HubError

SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class _Benchmark:
    name: str
    dataset: str
    metric: str
    config: str | None = None


_BENCHMARKS = {
    "gsm8k": _Benchmark("GSM8K", "openai/gsm8k", "exact_match", "main"),
    "gsm_plus": _Benchmark("GSM-Plus", "qintongli/GSM-Plus", "exact_match"),
    "humaneval": _Benchmark("HumanEval", "openai/openai_humaneval", "pass@1"),
    "humaneval_plus": _Benchmark("HumanEval+", "evalplus/humanevalplus", "pass@1"),
    "bfcl_simple_python": _Benchmark(
        "BFCL simple", "gorilla-llm/Berkeley-Function-Calling-Leaderboard", "accuracy", "simple"
    ),
    "bfcl_multiple": _Benchmark(
        "BFCL multiple", "gorilla-llm/Berkeley-Function-Calling-Leaderboard", "accuracy", "multiple"
    ),
}


def weights_identity(folder: Path) -> str:
    """SHA-256 over a folder's weight files, as an evaluation notes whom it judged."""
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def evaluation_rows(path: Path, checkpoint: Path, contract: Contract) -> list[dict[str, Any]]:
    """The rows of an evaluation's summary that judge this decoder as it is served.

    Args:
        path: `summary.json`, or the folder of the evaluation.
        checkpoint: the decoder's folder; its weights decide which rows are its own.

    Raises:
        HubError: there is no such summary, or it does not judge this decoder.
    """
    file = path / SUMMARY_NAME if path.is_dir() else path
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{path} is no evaluation: give the folder that `prefillshare eval` wrote ({error})"
        ) from error
    identity = weights_identity(checkpoint)
    own = [row for row in rows if row["decoder_sha256"] == identity]
    if not own:
        others = ", ".join(sorted({row["decoder"] for row in rows})) or "nobody"
        raise HubError(
            f"{file} judges {others}, and none has the weights of {checkpoint} ({identity}). "
            "Evaluate this very folder"
        )
    served = "self" if contract.method == "full_prompt" else "base"
    boundary = None if contract.method == "full_prompt" else contract.boundary
    kept = [row for row in own if row["prefill"] == served and row["boundary"] == boundary]
    if mismatch := next((row["contract_mismatch"] for row in kept if row["contract_mismatch"]), ""):
        raise HubError(f"{file} judges this decoder over another base: {mismatch}")
    if not kept:
        raise HubError(
            f"{file} has no row of this decoder with its prompts run by "
            f"{'itself' if served == 'self' else f'the base up to {boundary}'}"
        )
    return kept


def eval_results(rows: list[dict[str, Any]]) -> list[EvalResult]:
    """Rows of a summary in the form that the hub's `model-index` takes; scores in per cent."""
    results = []
    for row in rows:
        known = _BENCHMARKS.get(row["task"]) or _Benchmark(row["task"], row["task"], "accuracy")
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=known.dataset,
                dataset_name=known.name,
                dataset_config=known.config,
                dataset_split="test",
                dataset_args={"items": row["n"]},
                metric_type=known.metric,
                metric_name=f"{known.metric} (n = {row['n']})",
                metric_value=round(100 * row["score"], 2),
            )
        )
    return results


def training_log(checkpoint: Path) -> dict[str, Any]:
    """The last value of everything that a run logged; empty where there is no log.

    `train_loss` is the mean of the losses logged at its steps: the Trainer's own covers the last
    start of a run only.
    """
    finished, running = checkpoint / "log_history.json", checkpoint / "trainer_state.json"
    history: list[dict[str, Any]] = []
    if finished.is_file():
        history = json.loads(finished.read_text())
    elif running.is_file():
        history = json.loads(running.read_text())["log_history"]
    last: dict[str, Any] = {}
    for entry in history:
        last |= entry
    last.pop("train_loss", None)
    total, counted = 0.0, 0
    for entry in history:
        if "loss" in entry:  # the mean since the entry before
            total += entry["loss"] * (entry["step"] - counted)
            counted = entry["step"]
    if counted:
        last["train_loss"] = total / counted
    return last
