"""Evaluation speed beside lm-eval's own HFLM, on the same items, model and machine.

    python benchmarks/eval_speed.py --base .cache/models/smollm2-135m-instruct \\
        --decoder runs/a/decoder --decoder runs/b/decoder --decoder runs/c/decoder [--items 32] \\
        [--tokens 64]

Three LoRA decoders answer the same prompts: HFLM with `peft=` one after another, each prefilling
for itself, and ours together off one prefill; and one decoder alone both ways. Greedy, the same
dtype, device, stop strings, longest answer and batch size (of ours a decoder). Rounds are
interleaved, every other one in reverse order, and medians reported; loading and a first run of two
prompts are not timed. Prompts are BFCL multiple (long prompts, short answers) and GSM8K. HFLM's
decoders read their own prompts' K/V and ours the base's, so that answers differ; the tokens of the
answers' texts are printed beside the times. With `--tokens` every answer on either side has so many
tokens, whatever it says: nothing ends it, and both sides do the same work. A row is written once
its rounds are done, in place of the earlier one of its task and `--tokens`, so that they may be run
one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from prefillshare_train.core.devices import default_device, default_dtype_name
from prefillshare_train.evaluation.answering import Answered, answer
from prefillshare_train.evaluation.contestants import Contestants, DecoderSpec
from prefillshare_train.evaluation.prompts import Prompt, render
from prefillshare_train.evaluation.records import write_json
from prefillshare_train.evaluation.tasks import make_tasks
from prefillshare_train.evaluation.variants import Variant, variants_of
from prefillshare_train.workloads.machine import machine

TASKS = ("bfcl_multiple", "gsm8k")
SETTINGS = ("dtype", "device", "batch_size", "rounds", "tokens")


def hflm(base: str, decoder: Path, dtype: str, batch_size: int, device: str) -> HFLM:
    """lm-eval's model with a decoder as a plain adapter."""
    return HFLM(
        pretrained=base,
        peft=str(decoder),
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        max_length=8192,
    )


def hflm_run(
    models: list[HFLM],
    prompts: list[Prompt],
    texts: list[str],
    ends: list[str],
    tokens: int | None = None,
) -> int:
    """Every model answers every prompt; tokens of the answers' texts, or `tokens` an answer."""
    count = 0
    fixed = {} if tokens is None else {"min_new_tokens": tokens}
    for model in models:
        requests = [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(
                    text,
                    {
                        "until": [*prompt.item.stop, *ends],
                        "max_gen_toks": prompt.item.max_new_tokens,
                        "do_sample": False,
                        **fixed,
                    },
                ),
                idx=number,
            )
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        for output in model.generate_until(requests, disable_tqdm=True):
            count += tokens or len(model.tok_encode(output))
    return count


def our_run(
    contestants: Contestants, variants: list[Variant], prompts: list[Prompt], batch_size: int
) -> list[Answered]:
    """Every variant answers every prompt off one prefill."""
    wanted = [(prompt, variants) for prompt in prompts]
    found: list[Answered] = []
    answer(contestants, wanted, found.append, batch_size=batch_size, prefill_tokens=32768)
    return found


def text_tokens(contestants: Contestants, found: list[Answered]) -> int:
    """Tokens of the answers' texts, as HFLM's are counted."""
    outputs = [answered.output for answered in found]
    return sum(len(ids) for ids in contestants.renderer.encode(outputs))


def unending(prompts: list[Prompt], tokens: int) -> list[Prompt]:
    """The same prompts, to be answered in so many tokens, whatever comes."""
    return [
        dataclasses.replace(
            prompt, item=dataclasses.replace(prompt.item, stop=(), max_new_tokens=tokens)
        )
        for prompt in prompts
    ]


def timed(run: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and tokens generated."""
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row in place of the earlier one of its task and length, in the order of `TASKS`."""
    held = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [other for other in held if _kind(other) != _kind(row)] + [row]
    rows.sort(key=_kind)
    write_json(path, {"rows": rows})


def _kind(row: dict[str, Any]) -> tuple[int, int]:
    return TASKS.index(row["task"]), row["tokens"] or 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--decoder", action="append", type=Path, required=True)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--tokens", type=int, help="of every answer; none ends before or after")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default=default_dtype_name())
    parser.add_argument("--device", default=str(default_device()), help="of both sides")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval_speed.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    specs = [DecoderSpec(f"decoder{i}", folder) for i, folder in enumerate(options.decoder)]
    contestants = Contestants(
        options.base, specs, dtype=getattr(torch, options.dtype), device=options.device
    )
    variants = variants_of(contestants.decoders, "base", [])
    models = [
        hflm(options.base, folder, options.dtype, options.batch_size, options.device)
        for folder in options.decoder
    ]
    renderer = contestants.renderer
    if options.tokens is not None:
        contestants.renderer = dataclasses.replace(renderer, end_token_ids=())
    ends = [renderer.decode([token]) for token in renderer.end_token_ids]
    settings = {key: getattr(options, key) for key in SETTINGS}
    measured: list[dict[str, Any]] = []
    for task in make_tasks(options.task or TASKS, options.data):
        items = task.items()[: options.items]
        prompts = render(items, renderer, contestants.position_count)
        if options.tokens is not None:
            prompts = unending(prompts, options.tokens)
        texts = [renderer.decode(prompt.ids) for prompt in prompts]

        def theirs(count: int, p=prompts, t=texts) -> int:
            return hflm_run(models[:count], p, t, ends, options.tokens)

        def ours(count: int, p=prompts) -> int:
            found = our_run(contestants, variants[:count], p, options.batch_size)
            if options.tokens is None:
                return text_tokens(contestants, found)
            return sum(answered.tokens for answered in found)

        runs: dict[str, Callable[[], int]] = {
            "HFLM, all": partial(theirs, len(models)),
            "ours, all": partial(ours, len(models)),
            "HFLM, one": partial(theirs, 1),
            "ours, one": partial(ours, 1),
        }
        hflm_run(models, prompts[:2], texts[:2], ends, options.tokens)
        for warm in (variants, variants[:1]):
            our_run(contestants, warm, prompts[:2], options.batch_size)
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
        with tqdm(total=options.rounds * len(runs), desc=task.name, unit="run") as bar:
            for number in range(options.rounds):
                for name in list(runs)[:: -1 if number % 2 else 1]:
                    found[name].append(timed(runs[name]))
                    bar.update()
        seconds = {n: statistics.median(s for s, _ in values) for n, values in found.items()}
        row = {
            "task": task.name,
            "items": len(items),
            "decoders": len(options.decoder),
            "seconds": seconds,
            "output_tokens": {n: values[0][1] for n, values in found.items()},
            "all_to_hflm": seconds["ours, all"] / seconds["HFLM, all"],
            "one_to_hflm": seconds["ours, one"] / seconds["HFLM, one"],
            "machine": machine(),
            **settings,
        }
        keep_row(options.out, row)
        measured.append(row)
    table = Table(title=f"{machine()}; {options.dtype}, batches of {options.batch_size}")
    for column in ("task", "items", *seconds, "all / HFLM", "one / HFLM"):
        table.add_column(column, justify="right")
    for row in measured:
        cells = [
            f"{row['seconds'][n]:.1f} s, {row['output_tokens'][n]} tokens" for n in row["seconds"]
        ]
        ratios = (f"{row['all_to_hflm']:.2f}", f"{row['one_to_hflm']:.2f}")
        table.add_row(row["task"], str(row["items"]), *cells, *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
