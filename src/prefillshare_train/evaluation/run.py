"""One evaluation: answer what is not answered yet, judge what is not judged yet, sum up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from prefillshare_train.evaluation.answering import Answered, answer
from prefillshare_train.evaluation.bfcl import BfclTask
from prefillshare_train.evaluation.contestants import Contestants
from prefillshare_train.evaluation.prompts import Prompt, render
from prefillshare_train.evaluation.records import Record, RunFolder
from prefillshare_train.evaluation.statistics import wilson
from prefillshare_train.evaluation.summary import Stopwatch, Summary
from prefillshare_train.evaluation.task import (
    MACHINE_SETTINGS,
    EvalItem,
    EvaluationError,
    Task,
    Verdict,
)
from prefillshare_train.evaluation.variants import Variant

_ANSWER_KEYS = (
    "variant item_id request_sha256 base_tokens output output_tokens seconds prefill_seconds"
).split()
_VERDICT_KEYS = ("item_id", "correct", "output_tokens", "seconds")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is evaluated, and at once.

    Attributes:
        items: the first so many items of each task; None for all.
        batch_size: answers of each decoder that decode at once.
        prefill_tokens: prompt tokens whose K/V are held at once.
    """

    items: int | None = None
    batch_size: int = 16
    prefill_tokens: int = 32768


def evaluate(
    contestants: Contestants,
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    out: Path,
    limits: Limits,
) -> Path:
    """Run or go on with an evaluation.

    Items and prompts of all tasks are made before the first answer, so that what is wrong with any
    is told at once.

    Returns:
        `summary.json` in `out`.

    Raises:
        EvaluationError: data is missing, or `out` holds an evaluation of something else, one that
            still runs, or a damaged file.
    """
    prompts = {
        task.name: render(
            task.items()[: limits.items], contestants.renderer, contestants.position_count
        )
        for task in tasks
    }
    # Only now, so that what was wrong with a task binds no later try.
    folder = RunFolder(out)
    with folder.locked():
        return _evaluate(contestants, variants, tasks, prompts, folder, limits)


def _evaluate(
    contestants: Contestants,
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    prompts: Mapping[str, Sequence[Prompt]],
    folder: RunFolder,
    limits: Limits,
) -> Path:
    stopwatch = Stopwatch(folder.path)
    folder.claim("base", _identity(contestants))
    for variant in variants:
        identity = {
            "sha256": variant.decoder.identity,
            "boundary": str(variant.rule),
            "adapter": contestants.adapter_of(variant.decoder),
        }
        folder.claim(f"variant {variant.key}", identity)
    for task in tasks:
        folder.claim(f"task {task.name}", task.settings, aside=MACHINE_SETTINGS)
        _same_requests(task, prompts[task.name], folder)
    summary = Summary(folder.path, stopwatch)
    for task in tasks:
        _take_over(variants, task, prompts[task.name], folder, [t.name for t in tasks])
        _answer(contestants, variants, task, prompts[task.name], folder, limits, stopwatch)
        rows = _judge(variants, task, prompts[task.name], folder, stopwatch)
        counted = {prompt.item.item_id for prompt in prompts[task.name]}
        answers = [r for r in folder.outputs(task.name) if r["item_id"] in counted]
        summary.add(task, rows, answers)
        summary.write(_about(contestants, limits), complete=task is tasks[-1])
    return summary.path


def _same_requests(task: Task, prompts: Sequence[Prompt], folder: RunFolder) -> None:
    """Refuse answers to other requests: a template may give the date, a new version render anew."""
    now = {prompt.item.item_id: prompt.request_sha256 for prompt in prompts}
    for record in folder.outputs(task.name, _ANSWER_KEYS):
        if record["request_sha256"] != now.get(record["item_id"], record["request_sha256"]):
            raise EvaluationError(
                f"{folder.path}: {task.name} item {record['item_id']} was answered by "
                f"{record['variant']} to another prompt, stop strings or longest answer than it "
                "has now. The chat template may put the date into its prompts, or a package "
                "renders them anew. Name another --out"
            )


def _answer(
    contestants: Contestants,
    variants: Sequence[Variant],
    task: Task,
    prompts: Sequence[Prompt],
    folder: RunFolder,
    limits: Limits,
    stopwatch: Stopwatch,
) -> None:
    done = {(record["variant"], record["item_id"]) for record in folder.outputs(task.name)}
    wanted = [
        (prompt, left)
        for prompt in prompts
        if (left := [v for v in variants if (v.key, prompt.item.item_id) not in done])
    ]
    total = len(variants) * len(prompts)
    missing = sum(len(left) for _, left in wanted)
    with tqdm(total=total, initial=total - missing, desc=task.name, unit="answer") as bar:

        def keep(answered: Answered) -> None:
            folder.add_outputs(task.name, [_record(answered)])
            stopwatch.keep()
            bar.update()

        answer(
            contestants,
            wanted,
            keep,
            batch_size=limits.batch_size,
            prefill_tokens=limits.prefill_tokens,
        )


def _take_over(
    variants: Sequence[Variant],
    task: Task,
    prompts: Sequence[Prompt],
    folder: RunFolder,
    others: Sequence[str],
) -> None:
    """Copy answers to the very same requests from other tasks (HumanEval and HumanEval+)."""
    done = {(record["variant"], record["item_id"]) for record in folder.outputs(task.name)}
    held = {
        (record["variant"], record["request_sha256"]): {**record, "answered_in": other}
        for other in others
        if other != task.name
        for record in folder.outputs(other)
        if "answered_in" not in record
    }
    folder.add_outputs(
        task.name,
        (
            {**held[key], "item_id": prompt.item.item_id}
            for prompt in prompts
            for variant in variants
            if (variant.key, prompt.item.item_id) not in done
            and (key := (variant.key, prompt.request_sha256)) in held
        ),
    )


def _record(answered: Answered) -> Record:
    return {
        "variant": answered.variant.key,
        "item_id": answered.prompt.item.item_id,
        "prompt_sha256": answered.prompt.sha256,
        "request_sha256": answered.prompt.request_sha256,
        "prompt_tokens": len(answered.prompt.ids),
        "base_tokens": answered.base_tokens,
        "output": answered.output,
        "output_tokens": answered.tokens,
        "seconds": round(answered.seconds, 4),
        "prefill_seconds": round(answered.prefill_seconds, 4),
        "prefill_id": answered.prefill_id,
    }


def _judge(
    variants: Sequence[Variant],
    task: Task,
    prompts: Sequence[Prompt],
    folder: RunFolder,
    stopwatch: Stopwatch,
) -> list[Record]:
    """Verdicts on every answer, and a row of the summary for each variant."""
    outputs = {(r["variant"], r["item_id"]): r for r in folder.outputs(task.name)}
    items = [prompt.item for prompt in prompts]
    rows = []
    with tqdm(total=len(variants) * len(prompts), desc=f"judging {task.name}") as bar:
        for variant in variants:
            known = folder.verdicts(task.name, variant.key, _VERDICT_KEYS)
            bar.update(sum(item.item_id in known for item in items))

            def keep(
                item: EvalItem,
                verdict: Verdict,
                variant: Variant = variant,
                known: dict[str, Record] = known,
            ) -> None:
                record = outputs[variant.key, item.item_id] | dataclasses.asdict(verdict)
                folder.add_verdicts(task.name, variant.key, [record])
                known[item.item_id] = record
                stopwatch.keep()
                bar.update()

            left = [item for item in items if item.item_id not in known]
            said = [outputs[variant.key, item.item_id]["output"] for item in left]
            if left:
                task.judge(left, said, keep)
            # Items in order come first, then those of an earlier start with a higher limit.
            ordered = {key: known[key] for key in [*(i.item_id for i in items), *known]}
            if list(ordered) != list(known):
                folder.write_verdicts(task.name, variant.key, ordered.values())
            judged = [known[item.item_id] for item in items]
            if isinstance(task, BfclTask):
                answers = [record["output"] for record in judged]
                task.write_results(folder.path / "bfcl" / variant.key, items, answers)
            rows.append(_row(task, variant, judged))
    return rows


def _row(task: Task, variant: Variant, judged: Sequence[Record]) -> Record:
    right, count = sum(r["correct"] for r in judged), len(judged)
    return {
        "task": task.name,
        "decoder": variant.decoder.name,
        "label": variant.label,
        "method": variant.decoder.method,
        "adapter": variant.decoder.adapter,
        "decoder_sha256": variant.decoder.identity,
        "prefill": variant.prefill,
        "boundary": str(variant.rule) if variant.rule else None,
        "sharing_ratio": variant.sharing_ratio,
        "variant": variant.key,
        "n": count,
        "correct": right,
        "score": right / count,
        "ci95": list(wilson(right, count)),
        "output_tokens": sum(r["output_tokens"] for r in judged),
        "decode_seconds": round(sum(r["seconds"] for r in judged if "answered_in" not in r), 2),
        "contract_mismatch": variant.decoder.mismatch,
    }


def _identity(contestants: Contestants) -> Record:
    """What must be the same for answers to belong together; decoders are added one by one."""
    return {
        "base_fingerprint": contestants.base_fingerprint,
        "prompt": contestants.renderer.prompt_contract(),
        "dtype": str(contestants.dtype).removeprefix("torch."),
    }


def _about(contestants: Contestants, limits: Limits) -> Record:
    """What the summary says of the whole run."""
    packages = ("torch", "transformers", "peft", "prefillshare-train")
    return {
        "base": {"id": contestants.base, "revision": contestants.revision},
        "run": _identity(contestants),
        "decoding": {
            "strategy": "greedy",
            "seed": None,
            "batch_size": limits.batch_size,
            "end_token_ids": list(contestants.renderer.end_token_ids),
        },
        "contracts": {d.name: d.contract for d in contestants.decoders if d.contract},
        "items": limits.items,
        "device": str(contestants.prefill.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }
