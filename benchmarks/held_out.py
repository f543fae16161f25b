"""Train the SmolLM2-135M recipes by both methods and compare them on their held-out rows.

    python benchmarks/held_out.py [--task math] [--adapter lora]        # or: make results

For each task (Seal-Tools, GSM8K, MBPP) and each of LoRA and full fine-tuning: `prefillshare train`
with `method=prefillshare` and with `method=full_prompt`, then `prefillshare held-out`. It goes on
where it was: finished decoders and figures are kept, unfinished ones resumed from their last
checkpoint. Figures go to `benchmarks/results/held_out.json` after every pair; `make docs` puts them
into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.records import write_json
from prefillshare_train.workloads.machine import machine

RECIPES = Path("recipes/smollm2-135m")
RUNS = Path("runs/held_out")
RESULTS = Path("benchmarks/results/held_out.json")
ADAPTERS: dict[str, list[str]] = {"lora": [], "none": [str(RECIPES / "full.yaml")]}
TASKS = {"tool_calling": 100, "math": 100, "code": 50}  # and the turns that each answers
METHODS = ("prefillshare", "full_prompt")
PREFILLSHARE = [sys.executable, "-c", "from prefillshare_train.cli.main import main; main()"]


def run(arguments: list[str]) -> None:
    """Run the `prefillshare` command; its progress bar goes to the terminal."""
    print("prefillshare", " ".join(arguments), flush=True)
    subprocess.run([*PREFILLSHARE, *arguments], check=True)


def compare(task: str, adapter: str, batch_size: int) -> list[dict[str, Any]]:
    """Train what is not trained yet, measure what is not measured yet."""
    place = RUNS / task / adapter
    recipe = [str(RECIPES / f"{task}.yaml"), *ADAPTERS[adapter]]
    decoders = {method: place / method / "decoder" for method in METHODS}
    for method, decoder in decoders.items():
        if not decoder.is_dir():
            output = f"training.output_dir={decoder.parent}"
            run(["train", *recipe, f"method={method}", output, "--resume"])
    figures = place / "held_out.json"
    if not figures.is_file():
        measured = ["--decoder", str(decoders["prefillshare"])]
        measured += ["--full-prompt", str(decoders["full_prompt"]), "--out", str(figures)]
        measured += ["--rows", str(TASKS[task]), "--batch-size", str(batch_size)]
        run(["held-out", *recipe, *measured])
    trained = {method: training_log(decoder) for method, decoder in decoders.items()}
    rows = []
    for score in json.loads(figures.read_text())["scores"]:
        log = trained.get("full_prompt" if score["decoder"] == "naive" else score["decoder"], {})
        rows.append({"task": task, "adapter": adapter, **score, **log})
    return rows


def training_log(decoder: Path) -> dict[str, Any]:
    """Steps, and seconds from the first to the last (of the last start, where it was resumed).

    A run that was killed after its last step has told no seconds.
    """
    history = json.loads((decoder / "log_history.json").read_text())
    found = {"steps": max(entry["step"] for entry in history)}
    told = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    return found | ({"train_seconds": told[-1]} if told else {})


def main() -> None:
    """Run the tasks in turn and write the figures after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, action="append", help="all where not given")
    parser.add_argument("--adapter", choices=ADAPTERS, action="append", help="both where not given")
    parser.add_argument("--batch-size", type=int, default=16, help="turns answered at once")
    options = parser.parse_args()
    held: list[dict[str, Any]] = []
    if RESULTS.is_file():
        held = json.loads(RESULTS.read_text())["rows"]
    for task in options.task or TASKS:
        for adapter in options.adapter or ADAPTERS:
            rows = compare(task, adapter, options.batch_size)
            held = [r for r in held if (r["task"], r["adapter"]) != (task, adapter)] + rows
            versions = {name: version(name) for name in ("torch", "transformers", "peft")}
            write_json(RESULTS, {"machine": machine(), "versions": versions, "rows": held})


if __name__ == "__main__":
    main()
