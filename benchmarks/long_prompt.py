"""Peak memory of training on one long prompt: on the base's cache, and plain fine-tuning.

    python benchmarks/long_prompt.py [--prompt 32768] [--response 256] [--budget 64] [--plain-too]

LoRA on SmolLM2 with activation checkpointing, batch 1. The base runs the prompt in chunks within
`--budget` MiB of activations. Each is measured in a process of its own (see memory_estimate.py;
OMP_NUM_THREADS threads), over a step on a short row, which leaves the optimizer's state, and one on
the long row; plain fine-tuning only with --plain-too, since it takes several times as long, and is
estimated otherwise. Writes benchmarks/results/long_prompt.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from memory_estimate import LORA, estimated, measured

from prefillshare_train.workloads.machine import machine

RESULTS = Path(__file__).parent / "results" / "long_prompt.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--prompt", type=int, default=32_768)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--budget", type=float, default=64, help="MiB, training.prefill_memory_mib")
    parser.add_argument("--plain-too", action="store_true", help="measure plain fine-tuning too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = {
        "decoder": LORA,
        "lengths": [options.prompt, options.response, 1],
        "first_lengths": [64, 16],
        "training": {"activation_checkpointing": True, "bf16": True},
    }
    chunked = {**common["training"], "prefill_memory_mib": options.budget}
    cases: dict[str, dict[str, Any]] = {
        "prefillshare": {**common, "training": chunked},
        "full_prompt": {**common, "method": "full_prompt"},
    }
    results: dict[str, Any] = {
        "prompt": options.prompt,
        "response": options.response,
        "budget_mib": options.budget,
        "machine": machine(),
    }
    for name, case in cases.items():
        parts = estimated(options.model, case)
        found: dict[str, Any] = {"estimated_mib": round(sum(parts.values()) / 2**20)}
        if name == "prefillshare" or options.plain_too:
            start = time.perf_counter()
            found["measured_mib"] = round(measured(options.model, case))
            found["seconds"] = round(time.perf_counter() - start)
        results[name] = found
        print(name, found, flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
