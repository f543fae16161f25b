"""docs/results.md, from the files that benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent.parent / "benchmarks" / "results"
TASKS = {
    "tool_calling": "Tool calls (Seal-Tools, two distractor tools a request)",
    "math": "Maths (GSM8K)",
    "code": "Code (MBPP)",
}
ADAPTERS = {"lora": "LoRA", "none": "full"}
NAMES = {
    "base": "base",
    "full_prompt": "Full-FT: decoder runs the prompt",
    "naive": "naive: the same decoder on the base's cache",
    "prefillshare": "PrefillShare: decoder on the base's cache",
}


def page() -> str:
    """The whole document."""
    parts = [
        "# Results",
        "<!-- docs/results.md is generated from benchmarks/results by `make docs`: edit "
        "docs/results_page.py. -->",
    ]
    for make in (held_out, evaluations, evaluation_speed):
        parts += make()
    return "\n\n".join(parts) + "\n"


def held_out() -> list[str]:
    """Base, Full-FT, naive and PrefillShare on the training recipes' held-out rows."""
    path = FILES / "held_out.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    parts = [
        "## Held-out rows of the training recipes",
        "`make results` trains `recipes/smollm2-135m/{tool_calling,math,code}.yaml` with "
        "`method=prefillshare` and with `method=full_prompt`, LoRA and full, and compares them by "
        "`prefillshare held-out`. Loss is in nats a response token, over all held-out turns; exact "
        "match is over n greedy answers. Code is compared as text there, so that its exact match "
        "says little; its loss does. Minutes are those of the last start of a run, and other work "
        "was going on beside it at times: for speed see `make bench-train`.",
        f"SmolLM2-135M-Instruct; {machine_of(found)}.",
    ]
    for task, title in TASKS.items():
        rows = [row for row in found["rows"] if row["task"] == task]
        if rows:
            parts += [f"### {title}", held_out_table(rows)]
    return parts


def held_out_table(rows: list[dict[str, Any]]) -> str:
    """One table, LoRA before full; the base once."""
    lines = [
        "| | trained | steps | minutes | held-out loss | exact match | n |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    seen_base = False
    for row in rows:
        if row["decoder"] == "base":
            if seen_base:
                continue
            seen_base = True
        trained = "–" if row["decoder"] == "base" else ADAPTERS[row["adapter"]]
        steps = row.get("steps", "–")
        minutes = f"{row['train_seconds'] / 60:.0f}" if "train_seconds" in row else "–"
        lines.append(
            f"| {NAMES[row['decoder']]} | {trained} | {steps} | {minutes} | "
            f"{row['held_out_loss']:.3f} | {row['exact_match']:.1%} | {row['n']} |"
        )
    return "\n".join(lines)


def evaluations() -> list[str]:
    """The harnesses' tables, as `prefillshare compare` wrote them."""
    path = FILES / "evaluation.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    parts = [
        "## Benchmarks",
        "`python benchmarks/evaluation.py --no-base` evaluates decoders of the recipes above; the "
        "command of each table stands over it. Where nothing else is said they are those of `make "
        "results`. Those of the sharing ratios were trained anew, with `data.eval=null "
        "training.eval_strategy=no`: 38 steps, as part of the 320 rows was held out. Their scores "
        "do not belong beside those of the first table. Full-FT is the `full_prompt` decoder by "
        "itself, naive the same decoder on the base's cache.",
    ]
    for table in found["tables"]:
        parts += [f"### {table['title']}", f"SmolLM2-135M-Instruct; {machine_of(table)}."]
        parts.append(f"```sh\n{table['command']}\n```")
        if "trained" in table:
            trained = "; ".join(f"{name}: {how}" for name, how in table["trained"].items())
            parts.append(f"Trained: {trained}.")
        parts.append(table["markdown"].strip())
        parts.append(f"![](../benchmarks/results/{table['plot']})")
    return parts


def evaluation_speed() -> list[str]:
    """Beside lm-eval's own HFLM."""
    path = FILES / "eval_speed.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())["rows"]
    lines = [
        "| | items | tokens an answer | decoders | HFLM | ours | of HFLM's time | a token | "
        "one decoder: HFLM | ours | of HFLM's time | a token | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        seconds, tokens = row["seconds"], row["output_tokens"]
        cells = {name: f"{seconds[name]:.0f} s, {tokens[name]:,} tokens" for name in seconds}
        many, one = (
            row[ratio] * tokens[f"HFLM, {which}"] / tokens[f"ours, {which}"]
            for ratio, which in (("all_to_hflm", "all"), ("one_to_hflm", "one"))
        )
        lines.append(
            f"| {row['task']} | {row['items']} | {row['tokens'] or 'as they end'} | "
            f"{row['decoders']} | {cells['HFLM, all']} | "
            f"{cells['ours, all']} | {row['all_to_hflm']:.2f} | {many:.2f} | "
            f"{cells['HFLM, one']} | {cells['ours, one']} | {row['one_to_hflm']:.2f} | {one:.2f} | "
            f"{row['machine']}; {row['dtype']}, "
            f"batches of {row['batch_size']} a decoder, {row['rounds']} rounds |"
        )
    return [
        "## Speed of evaluation",
        "`python benchmarks/eval_speed.py --base B --decoder D … --task T --items N --rounds N "
        "[--tokens N]`: LoRA decoders answer the same prompts with lm-eval's HFLM, one decoder "
        "after another, and with ours, together off one prefill; medians of rounds in turns. They "
        "were trained by `prefillshare train recipes/smollm2-135m/tool_calling.yaml` with "
        "`training.max_steps=16 training.seed=0`, `training.max_steps=8 training.seed=1` and "
        "`training.max_steps=8 training.seed=2`; the first is the one that answers alone. HFLM's "
        "decoders read their own prompts' K/V and ours the base's, so answers differ: their "
        "lengths stand beside the times, and the times a token beside their ratio. With "
        "`--tokens` nothing ends an answer before so many, on either side.",
        "\n".join(lines),
    ]


def machine_of(found: dict[str, Any]) -> str:
    """Machine and versions, for a reader."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['machine']}; {versions}"
