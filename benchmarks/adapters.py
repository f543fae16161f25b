"""A decoding step of several LoRA decoders: stacked adapters, PEFT's mixed batch, one by one.

    python benchmarks/adapters.py [--rows 8] [--adapters 4] [--repeats 15]

Interleaved, medians; milliseconds a step on the real base, with prompts of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from serve_setup import random_decoders

from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.serving.adapters import PeftAdapters, stack_adapters
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import DecodeRow, Lane
from prefillshare_train.workloads.machine import machine

PROMPT = 512
BLOCK = 16


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default=default_dtype_name(), choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = random_decoders(options.model, Path(folder), options.adapters, options.dtype)
        loaded = DecoderSet(options.model, folders, dtype=getattr(torch, options.dtype))
    assert loaded.lora is not None
    names = list(loaded.adapters.values())
    stacked = stack_adapters(loaded.base, loaded.lora, names)
    assert stacked is not None
    held = PROMPT // BLOCK
    storage = KVStorage(KVGeometry.of(loaded.base), options.rows * (held + 1), BLOCK)
    rows = [
        DecodeRow(
            100 + n,
            names[n % len(names)],
            range(n * (held + 1), n * (held + 1) + held),
            PROMPT,
            [n * (held + 1) + held],
            0,
        )
        for n in range(options.rows)
    ]
    peft = Lane(loaded.lora, PeftAdapters(loaded.lora))

    def one_by_one() -> None:
        for name in names:
            mine = [row for row in rows if row.adapter == name]
            if mine:
                peft.step(storage, mine)

    ways = {
        "stacked": lambda: Lane(*stacked).step(storage, rows),
        "peft mixed batch": lambda: peft.step(storage, rows),
        "one adapter after another": one_by_one,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {
        "machine": machine(),
        "rows": options.rows,
        "adapters": options.adapters,
        "dtype": options.dtype,
        "ms_per_step": {name: statistics.median(values) for name, values in times.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
