"""Prefill in the engine's loop, in a process of its own, and at an address: throughput and the hop.

    python benchmarks/disaggregated.py [--requests 16] [--prompt 512] [--response 32] [--repeats 3]

The same requests (distinct prompts, four decoders in turn) on each; medians. The hop is from the
end of a prefill's forward pass until the engine knows its K/V are in place: a message over shared
memory, a message and a copy over TCP.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from serve_setup import random_decoders

from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.serving.api import Event, GenerationRequest, SamplingParams
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.remote import PrefillServer
from prefillshare_train.workloads.machine import machine

KEY = "benchmark"


def requests_of(options: argparse.Namespace, names: list[str], seed: int) -> list[Any]:
    """Distinct prompts, answered by the decoders in turn."""
    chosen = random.Random(seed)
    sampling = SamplingParams(max_tokens=options.response, ignore_eos=True)
    return [
        GenerationRequest(
            names[n % len(names)],
            tuple(chosen.randrange(100, 40000) for _ in range(options.prompt)),
            sampling,
        )
        for n in range(options.requests)
    ]


def measure(models: ServedModels, config: EngineConfig, wanted: list[Any]) -> dict[str, float]:
    """Response tokens a second, and milliseconds of the hop."""
    done = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if event.finish_reason is not None:
            done.release()

    with Engine(models, config) as engine:
        start = time.perf_counter()
        for one in wanted:
            engine.submit(one, sink)
        for _ in wanted:
            done.acquire()
        seconds = time.perf_counter() - start
        stats = engine.stats()
    return {
        "tokens_per_s": stats.completion_tokens / seconds,
        "hop_ms": 1e3 * stats.handover_seconds / max(1, stats.prefill_batches),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=default_dtype_name(), choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/disaggregated.json"))
    options = parser.parse_args()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        folders = random_decoders(options.model, Path(folder), 4, options.dtype)
        models = ServedModels.load(options.model, folders, dtype=getattr(torch, options.dtype))
    server = PrefillServer(models.base, models.base_fingerprint, ("127.0.0.1", 0), KEY.encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.address[1]}"
    ways = {
        "in the loop": EngineConfig(),
        "process": EngineConfig(disaggregated=True),
        "address": EngineConfig(prefill_addresses=(address,), prefill_key=KEY),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        for name, config in ways.items():
            torch.set_num_threads(threads)
            wanted = requests_of(options, list(folders), repeat)
            runs[name].append(measure(models, config, wanted))
    result = {
        "machine": machine(),
        **{k: v for k, v in vars(options).items() if k not in ("out", "model")},
        "ways": {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
