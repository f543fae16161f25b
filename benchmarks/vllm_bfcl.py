"""A trained decoder served by vLLM, against `prefillshare eval`: the same BFCL items, one by one.

    make demo && python benchmarks/vllm_bfcl.py --decoder runs/demo/tool_calling/decoder

The decoder answers through `prefillshare vllm up --lora` (store route, one process) and our router,
prompts sent as token ids, greedily in float32; the same items are answered by the evaluation's own
code, off `core`. One judge, BFCL's, looks at both. Where the outputs differ, the item is listed
with the gap between the two likeliest tokens where they part, as `core` has it: below `--tie` the
two implementations' rounding decides.

Answers lie in `--runs`; a run that was killed goes on from there. Results:
`benchmarks/results/vllm_bfcl.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from vllm_systems import Servers, stop_on_sigterm

from prefillshare_train.core.contract import Contract
from prefillshare_train.core.generate import generate
from prefillshare_train.engines.vllm.vllm_python import find_python, look_into
from prefillshare_train.evaluation.contestants import Contestants, DecoderSpec
from prefillshare_train.evaluation.prompts import Prompt, render
from prefillshare_train.evaluation.records import Record, RunFolder
from prefillshare_train.evaluation.run import Limits, evaluate
from prefillshare_train.evaluation.task import Task
from prefillshare_train.evaluation.tasks import make_tasks
from prefillshare_train.evaluation.variants import Variant, variants_of
from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine

TASKS = ("bfcl_simple_python", "bfcl_multiple")
NAME = "tools"
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Parting:
    """Where `core`'s answer leaves another.

    Attributes:
        at_token: index in the response.
        gap: between the two likeliest tokens' logits there.
        runner_up: whether the other answer goes on with the second of them.
    """

    at_token: int
    gap: float
    runner_up: bool


class _TopTwo(LogitsProcessor):
    """Keeps the two likeliest tokens of each step, and the gap between their logits."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        top = scores[0].topk(2)
        self.seen.append((int(top.indices[1]), float(top.values[0] - top.values[1])))
        return scores


def first_difference(texts: Sequence[str], other: str) -> int | None:
    """The token at which a response stops being the beginning of another text.

    Args:
        texts: the response decoded up to each of its tokens; that of an end token adds nothing.

    Returns:
        Its index; None where both are the same.
    """
    for index, text in enumerate(texts):
        # Half a character of several bytes decodes to a replacement, until the rest is there.
        if not other.startswith(text.rstrip("\ufffd")):
            return index
    return None if texts and texts[-1] == other else len(texts) - 1


def parting(contestants: Contestants, variant: Variant, prompt: Prompt, *others: str) -> Parting:
    """Answer a prompt again, alone, and find where that leaves the first text that it leaves."""
    cut = variant.base_length(len(prompt.ids), prompt.header_length)
    cache = contestants.prefill.prefill([prompt.ids[:cut]])
    seen = _TopTwo()
    renderer = contestants.renderer
    decoder, running = contestants.model_for([variant.decoder])
    [ids] = generate(
        decoder,
        cache,
        [prompt.ids],
        max_new_tokens=prompt.item.max_new_tokens,
        stop_ids=renderer.end_token_ids,
        processors=LogitsProcessorList([seen]),
        running=running,
    )

    def text(tokens: Sequence[int]) -> str:
        return renderer.decode(list(tokens), skip_special_tokens=True)

    texts = [text(ids[: end + 1]) for end in range(len(ids))]
    for other in others:
        if (at := first_difference(texts, other)) is not None:
            second, gap = seen.seen[at]
            instead = text([*ids[:at], second]).rstrip("\ufffd")
            ends = second in renderer.end_token_ids and other == instead
            return Parting(at, gap, ends or (other.startswith(instead) and instead != texts[at]))
    raise AssertionError("core gives both texts, and they differ")


def compared(
    task: str, evaluated: Record, output: str, correct: bool, found: Parting | None, tie: float
) -> Record:
    """One item: what both sides answered, and the same judge's verdicts.

    Args:
        evaluated: the evaluation's judged record.
        output, correct: the endpoint's answer and its verdict.
        found: where they part; None where the outputs are equal.
        tie: a gap below this is a near-tie.
    """
    row: Record = {
        "task": task,
        "item_id": evaluated["item_id"],
        "same_output": evaluated["output"] == output,
        "eval_correct": evaluated["correct"],
        "endpoint_correct": correct,
    }
    if found is not None:
        row |= dataclasses.asdict(found)
        row |= {"near_tie": found.gap < tie and found.runner_up}
        row |= {"eval_output": evaluated["output"], "endpoint_output": output}
    return row


def summary(rows: Sequence[Record], tie: float) -> Record:
    """Counts, and the items that differ."""
    differ = [row for row in rows if not row["same_output"]]
    other_verdict = [row for row in rows if row["eval_correct"] != row["endpoint_correct"]]
    return {
        "items": len(rows),
        "same_output": len(rows) - len(differ),
        "same_verdict": len(rows) - len(other_verdict),
        "eval_correct": sum(row["eval_correct"] for row in rows),
        "endpoint_correct": sum(row["endpoint_correct"] for row in rows),
        "near_tie_below": tie,
        "near_ties": sum(row["near_tie"] for row in differ),
        "unexplained": [row["item_id"] for row in differ if not row["near_tie"]],
        "differing": differ,
    }


def served_copy(folder: Path, dtype: str, place: Path) -> Path:
    """The decoder with a contract for K/V of another dtype, in which it is compared.

    A decoder is served in the dtype that it was trained with. Near-ties flip often in bfloat16, so
    that the comparison is made in float32 on both sides; the evaluation takes that by itself.
    """
    contract = Contract.load(folder)
    if contract.kv_dtype == dtype:
        return folder
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    dataclasses.replace(contract, kv_dtype=dtype).save(place)
    return place


async def ask(
    url: str, prompts: Sequence[Prompt], at_once: int, told: Callable[[Prompt, str, int], object]
) -> None:
    """Greedy answers to prompts, sent as token ids.

    Args:
        told: called with each prompt, its answer and the answer's tokens.
    """
    places = asyncio.Semaphore(at_once)

    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:

        async def one(prompt: Prompt) -> None:
            body = {
                "model": NAME,
                "prompt": list(prompt.ids),
                "max_tokens": prompt.item.max_new_tokens,
                "temperature": 0,
            }
            if prompt.item.stop:
                body["stop"] = list(prompt.item.stop)
            async with places:
                answer = await client.post("/v1/completions", json=body)
            if not answer.is_success:
                raise SystemExit(f"{prompt.item.item_id}: {answer.status_code} {answer.text}")
            found = answer.json()
            told(prompt, found["choices"][0]["text"], found["usage"]["completion_tokens"])

        await asyncio.gather(*map(one, prompts))


def answer_over_http(
    options: argparse.Namespace,
    folder: RunFolder,
    variant: Variant,
    prompts: dict[str, list[Prompt]],
) -> None:
    """Answers from the endpoint, into the folder; those that are there are not asked again."""
    left = {}
    for task, wanted in prompts.items():
        done = {record["item_id"] for record in folder.outputs(task)}
        left[task] = [prompt for prompt in wanted if prompt.item.item_id not in done]
    if not any(left.values()):
        return
    python = look_into(find_python(options.vllm_python))
    python.require(nixl=False)
    decoder = served_copy(options.decoder, options.dtype, options.runs / "decoder")
    servers = Servers(
        base=options.model,
        decoders={NAME: decoder},
        dtype=options.dtype,
        kv_gib=2,
        block_tokens=options.block_tokens,
        rows=options.at_once,
        python=python.path,
        runs=options.runs,
    )
    with servers.running("shared") as server:
        for task, wanted in left.items():
            with tqdm(total=len(wanted), desc=f"{task} over HTTP", unit="answer") as bar:

                def keep(
                    prompt: Prompt, output: str, tokens: int, task: str = task, bar: Any = bar
                ) -> None:
                    record = {
                        "variant": variant.key,
                        "item_id": prompt.item.item_id,
                        "prompt_sha256": prompt.sha256,
                        "output": output,
                        "output_tokens": tokens,
                    }
                    folder.add_outputs(task, [record])
                    bar.update()

                asyncio.run(ask(server.url, wanted, options.at_once, keep))


def compare_task(
    contestants: Contestants,
    variant: Variant,
    task: Task,
    prompts: Sequence[Prompt],
    folders: tuple[RunFolder, RunFolder],
    tie: float,
) -> list[Record]:
    """Both sides' answers to a task, item by item."""
    evaluated = folders[0].verdicts(task.name, variant.key)
    outputs = {record["item_id"]: record["output"] for record in folders[1].outputs(task.name)}
    ordered = [outputs[prompt.item.item_id] for prompt in prompts]
    verdicts = task.judge([prompt.item for prompt in prompts], ordered, lambda *_: None)
    rows = []
    for prompt, output, verdict in zip(prompts, ordered, verdicts, strict=True):
        record = evaluated[prompt.item.item_id]
        found = None
        if record["output"] != output:
            found = parting(contestants, variant, prompt, output, record["output"])
        rows.append(compared(task.name, record, output, verdict.correct, found, tie))
    return rows


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", type=Path, required=True, help="folder of a LoRA decoder")
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--items", type=int, default=100, help="half of each category")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tie", type=float, default=1e-3, help="gap of logits below which is one")
    parser.add_argument("--at-once", type=int, default=8, help="requests at the endpoint")
    parser.add_argument("--block-tokens", type=int, default=32, help="of vLLM's blocks")
    parser.add_argument("--vllm-python", type=Path, help="Python that has vLLM")
    parser.add_argument("--runs", type=Path, default=Path("runs/vllm_bfcl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """Answer by both ways, judge, compare, write."""
    stop_on_sigterm()
    options = parse()
    tasks = make_tasks(TASKS, options.data)
    count = options.items // len(tasks)
    dtype = getattr(torch, options.dtype)
    spec = DecoderSpec.parse(f"{NAME}={options.decoder}")
    contestants = Contestants(options.model, [spec], dtype=dtype)
    [variant] = variants_of(contestants.decoders, None, ())
    # Groups of a few prompts, whose answers are kept as they come.
    limits = Limits(items=count, prefill_tokens=4096)
    evaluate(contestants, [variant], tasks, options.runs / "eval", limits)
    folders = RunFolder(options.runs / "eval"), RunFolder(options.runs / "endpoint")
    identity = {"sha256": variant.decoder.identity, "dtype": options.dtype}
    folders[1].claim(f"variant {variant.key}", identity)
    prompts = {
        task.name: render(task.items()[:count], contestants.renderer, contestants.position_count)
        for task in tasks
    }
    answer_over_http(options, folders[1], variant, prompts)
    rows = []
    for task in tasks:
        rows += compare_task(contestants, variant, task, prompts[task.name], folders, options.tie)
    found = summary(rows, options.tie)
    setup = {
        "base": Path(options.model).name,
        "decoder": str(options.decoder),
        "decoder_sha256": variant.decoder.identity,
        "boundary": str(variant.rule),
        "dtype": options.dtype,
        "trained_kv_dtype": variant.decoder.contract["kv_dtype"],
        "block_tokens": options.block_tokens,
        "requests_at_once": options.at_once,
        "machine": machine(),
    }
    path = options.out / "vllm_bfcl.json"
    write_json(path, {"setup": setup, "summary": found, "items": rows})
    print(
        f"{found['items']} items: {found['same_output']} equal outputs, {found['same_verdict']} "
        f"equal verdicts ({found['eval_correct']} right in the evaluation, "
        f"{found['endpoint_correct']} at the endpoint), {found['near_ties']} near-ties, "
        f"{len(found['unexplained'])} unexplained. {path}"
    )


if __name__ == "__main__":
    main()
