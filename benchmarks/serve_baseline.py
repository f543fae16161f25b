"""The same sessions served by transformers' own `generate`, beside our engine.

    python benchmarks/serve_baseline.py [--sessions 8] [--batch 8]

What a user has without a serving engine: one base with the four LoRA adapters (PEFT), and the
sessions' calls answered in batches. Calls are made in rounds: in round k every running session
makes its k-th call, so that all rows of a batch are for one decoder, the adapter is switched once a
round, and rows are left-padded to the longest.

- `generate`: static batches; nothing is kept between calls.
- `generate_batch`: transformers' continuous batching, with its paged cache and prefix sharing, one
  manager a decoder, since its cache does not know adapters.
- `prefillshare`: our engine, shared, the same sessions at once.

Every response has its fixed length (a row of a static batch runs to the batch's longest, and only
its own tokens count). Repeats are interleaved and medians reported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from serve_setup import Lab, decoders_of, random_decoders
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers import logging as transformers_logging

from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import LoadPoint
from prefillshare_train.workloads.sessions import Session

PAGE_TOKENS = 16
Batch = tuple[str, list[tuple[int, ...]], list[int]]


def rounds_of(sessions: Sequence[Session], batch: int) -> Iterator[Batch]:
    """Decoder, prompts and response lengths of each batch, `batch` sessions at a time."""
    for start in range(0, len(sessions), batch):
        group = sessions[start : start + batch]
        prompts = [session.prompts() for session in group]
        for number in range(max(len(session.turns) for session in group)):
            rows = [row for row, session in enumerate(group) if number < len(session.turns)]
            yield (
                group[rows[0]].turns[number].decoder,
                [prompts[row][number] for row in rows],
                [group[row].turns[number].max_tokens for row in rows],
            )


class Peft:
    """One base with every decoder as an adapter, as PEFT loads them."""

    def __init__(self, base: str, folders: dict[str, Path], dtype: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        first, *others = folders
        self.model = PeftModel.from_pretrained(model, str(folders[first]), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(folders[name]), adapter_name=name)
        self.model.eval()
        # Responses have fixed lengths.
        self.settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    @torch.inference_mode()
    def static(self, batches: Sequence[Batch], on_call: Callable[[int], object]) -> None:
        """`generate` on left-padded batches."""
        for decoder, prompts, lengths in batches:
            self.model.set_adapter(decoder)
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            longest = max(lengths)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self.settings,
                max_new_tokens=longest,
            )
            if output.shape[1] != width + longest:
                raise SystemExit(f"generate ended after {output.shape[1] - width} of {longest}")
            on_call(len(prompts))

    @contextlib.contextmanager
    def managers(self, batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
        """`generate_batch`'s manager for each decoder, running inside the block.

        They are kept for the whole load, so that their prefix caches are too.
        """
        longest = max(len(p) + n for _, ps, ns in batches for p, n in zip(ps, ns, strict=True))
        at_once = max(len(prompts) for _, prompts, _ in batches)
        with contextlib.ExitStack() as stack:
            yield {
                decoder: stack.enter_context(
                    self.model.get_base_model().continuous_batching_context_manager(
                        generation_config=self.settings,
                        # Sized to the load, with room for as many sessions again to be found; left
                        # to itself it takes most of the memory, and every step then fills masks of
                        # that size.
                        continuous_batching_config=ContinuousBatchingConfig(
                            page_size=PAGE_TOKENS,
                            num_blocks=2 * at_once * (longest // PAGE_TOKENS + 2),
                            max_batch_tokens=256,
                            max_requests_per_batch=at_once,
                        ),
                    )
                )
                for decoder in dict.fromkeys(decoder for decoder, _, _ in batches)
            }

    def continuous(
        self,
        managers: dict[str, Any],
        batches: Sequence[Batch],
        on_call: Callable[[int], object],
    ) -> None:
        """Every batch through its decoder's manager."""
        for decoder, prompts, lengths in batches:
            self.model.set_adapter(decoder)
            manager = managers[decoder]
            wanted = {
                manager.add_request(list(prompt), max_new_tokens=count): count
                for prompt, count in zip(prompts, lengths, strict=True)
            }
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise SystemExit("the continuous-batching thread ended")
                elif result.is_finished():
                    count = wanted.pop(result.request_id)
                    if result.error or len(result.generated_tokens) != count:
                        raise SystemExit(f"generate_batch: {result.error or 'a short response'}")
                    on_call(1)


def transformers_seconds(
    model: Peft, method: str, batches: Sequence[Batch], on_call: Callable[[int], object]
) -> float:
    """Seconds for all batches by `generate` or `generate_batch`, start and stop left out."""
    if method == "generate":
        start = time.perf_counter()
        model.static(batches, on_call)
        return time.perf_counter() - start
    with model.managers(batches) as managers:
        start = time.perf_counter()
        model.continuous(managers, batches, on_call)
        return time.perf_counter() - start


def our_engine(lab: Lab, sessions: int, batch: int) -> float:
    """Seconds for the same sessions, `batch` at once; run anew every time, as the others are."""
    plan = lab.plan
    point = LoadPoint(
        experiment="baseline",
        workload=plan.kind,
        regime="compute",
        mode="shared",
        decoders=len(plan.decoders),
        sessions_per_s=None,
        max_sessions=batch,
        sessions=sessions,
        kv_bytes=lab.kv_bytes(plan, batch, 1, sessions),
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = replace(lab, out=Path(folder)).bench().run([point])[point]
    if figures["errors"]:
        raise SystemExit(f"{figures['errors']} calls failed on our engine")
    seconds: float = figures["duration_s"]
    return seconds


METHODS = ("generate", "generate_batch", "prefillshare")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--decoder", action="append", default=[], help="name=folder")
    parser.add_argument("--dtype", default=default_dtype_name(), choices=("float32", "bfloat16"))
    parser.add_argument("--traces", type=Path, default=Path("../shared/data/react_traces"))
    parser.add_argument("--workload", default="react", choices=("react", "reflexion"))
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="sessions at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--runs", type=Path, default=Path("runs/serve"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_baseline.json"))
    return parser.parse_args()


def main() -> None:
    """Run every method, interleaved, and print and write medians."""
    options = parse()
    transformers_logging.set_verbosity_error()  # every call warns that EOS ends nothing
    folders = decoders_of(options.decoder) or random_decoders(
        options.model, options.runs / "decoders", 4, options.dtype
    )
    lab = Lab.load(
        options.model,
        folders,
        dtype=options.dtype,
        traces=options.traces if options.traces.is_dir() else None,
        system_tokens=options.system_tokens,
        seed=options.seed,
        workload=options.workload,
        out=options.runs,
        objectives=Objectives(),
    )
    sessions = lab.plan.sessions(options.sessions)
    batches = list(rounds_of(sessions, options.batch))
    tokens = sum(turn.max_tokens for session in sessions for turn in session.turns)
    seconds: dict[str, list[float]] = {method: [] for method in options.methods}
    models: dict[str, Peft] = {}
    calls = sum(len(session.turns) for session in sessions)
    for repeat in range(options.repeats):
        for method in options.methods:
            if method == "prefillshare":
                taken = our_engine(lab, options.sessions, options.batch)
                seconds[method].append(taken)
                continue
            if method not in models:
                models[method] = Peft(options.model, folders, options.dtype)
            with tqdm(total=calls, unit="call", desc=f"{method} {repeat}") as bar:
                seconds[method].append(
                    transformers_seconds(models[method], method, batches, bar.update)
                )
    medians = {method: float(np.median(times)) for method, times in seconds.items()}
    rows = [
        {
            "method": method,
            "workload": options.workload,
            "sessions": options.sessions,
            "at_once": options.batch,
            "decoders": len(folders),
            "dtype": options.dtype,
            "response_tokens": tokens,
            "seconds": taken,
            "throughput_tok_s": tokens / taken,
            "repeats": options.repeats,
            "machine": machine(),
        }
        for method, taken in medians.items()
    ]
    write_json(options.out, rows)
    table = Table(title=f"{options.workload}, {options.sessions} sessions, {machine()}")
    for column in ("method", "seconds", "response tok/s", f"times {options.methods[0]}"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = f"{medians[options.methods[0]] / row['seconds']:.2f}"
        table.add_row(
            row["method"], f"{row['seconds']:.1f}", f"{row['throughput_tok_s']:.1f}", ratio
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
