"""docs/speed.md: training speed and memory, from the files that benchmarks wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent.parent / "benchmarks" / "results"
NAMES = {"sft": "hand-written", "trl": "TRL", "alora": "aLoRA (TRL)", "prefillshare": "ours"}
ADAPTERS = {"none": "full", "lora": "LoRA"}


def page() -> str:
    """The whole document."""
    parts = [
        "# Training speed and memory",
        "<!-- docs/speed.md is generated from benchmarks/results by `make docs`: edit "
        "docs/speed_page.py. -->",
    ]
    for make in (_training, _gpu, _profile, _decoders, _long_prompt, _memory_estimate):
        parts += make()
    return "\n\n".join(parts) + "\n"


def _read(name: str) -> Any:
    path = FILES / name
    return json.loads(path.read_text()) if path.is_file() else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def _training() -> list[str]:
    rows = _read("train_speed.json")
    if not rows:
        return []
    parts = [
        "## Beside other ways to train",
        "`make bench-train` measures a hand-written SFT loop, TRL's SFTTrainer, PEFT's aLoRA under "
        "TRL, and ours on the same token ids, interleaved in one process: medians of three rounds "
        "(Seal-Tools: two), and one round of TRL and aLoRA, whose ratio is to the hand-written "
        "loop's in that round. seal_tools is three requests of the real length distribution (1,680 "
        "prompt and 104 response tokens on average), each a micro-batch. ratio: step "
        "time of the hand-written loop over that of the method, in the same round, for a machine's "
        "speed changes from round to round. bound: the same by FLOPs "
        "([formula](method.md#cost)). matmul: FLOP/s of the passes over what a plain matrix "
        "product of the model's MLP shape reached in the same rounds. MiB: peak resident memory of "
        "a step in a process of its own, libraries included. In full fine-tuning weights, "
        "gradients and AdamW's states, and beside ours the frozen base, are there whatever the "
        "batch: where activations are few (checkpointing, one conversation) they are most of "
        "either's memory, which so differs little; libraries and weights are so with LoRA and "
        "checkpointing. Every method's loss at step 0 agreed. "
        "The whole grid takes hours on two cores; a run that is cut off goes on where it was.",
        f"Measured on {', '.join(sorted({row['machine'] for row in rows}))}.",
    ]
    return [*parts, *_targets(rows), *_speed_tables(rows)]


def _targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was aimed at, beside what was reached."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] == "prefillshare":
            checkpointing = "yes" if row["checkpointing"] else "no"
            key = (row["model"], ADAPTERS[row["adapter"]], checkpointing, row["dtype"])
            groups.setdefault(key, []).append(row)

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} to {high}"

    def times(row: dict[str, Any]) -> float:
        return float(row["prompt_tokens"] / row["response_tokens"])

    lines = []
    for key, found in sorted(groups.items()):
        long = [r for r in found if times(r) >= 4]
        longest = [r for r in found if times(r) >= 8]
        short = [r["ratio_to_sft"] for r in found if times(r) == 1]
        lines.append(
            [
                *key,
                span([r["ratio_to_sft"] / r["flop_bound"] for r in long]),
                span(short),
                span([r["peak_memory_to_sft"] for r in longest]),
                span([r["matmul_share"] for r in long]),
            ]
        )
    header = ["model", "adapter", "checkpointing", "dtype", "of the bound, P/R >= 4"]
    header += ["ratio at P/R = 1", "memory, P/R >= 8", "matmul, P/R >= 4"]
    return [
        "Ours, lowest to highest of each kind of setting. Aimed at: 0.95 of the bound, a ratio of "
        "1, 0.65 of the hand-written loop's memory, and in bfloat16 0.6 of the rate of a plain "
        "matrix product. What falls short is explained by "
        "[the profile](#where-a-steps-time-goes).",
        _table(header, lines, texts=4),
    ]


def _speed_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    header = ["adapter", "P/R", "batch", "method", "response tokens/s", "ratio", "bound"]
    header += ["of the bound", "matmul", "MiB", "of hand-written"]
    groups: dict[tuple[str, str, bool], list[list[str]]] = {}
    for row in rows:
        key = (row["model"], row["dtype"], row["checkpointing"])
        groups.setdefault(key, []).append(
            [
                ADAPTERS[row["adapter"]],
                row["workload"],
                str(row["conversations_per_micro_batch"]),
                NAMES[row["method"]],
                f"{row['response_tokens_per_s']:.1f}",
                f"{row['ratio_to_sft']:.2f}",
                f"{row['flop_bound']:.2f}",
                f"{row['ratio_to_sft'] / row['flop_bound']:.2f}",
                f"{row['matmul_share']:.2f}",
                f"{row['peak_memory_mib']:.0f}",
                f"{row['peak_memory_to_sft']:.2f}",
            ]
        )
    for (model, dtype, checkpointing), cells in groups.items():
        how = ", activation checkpointing" if checkpointing else ""
        parts += [f"### {model}, {dtype}{how}", _table(header, cells, texts=4)]
    return parts


def _gpu() -> list[str]:
    rows = _read("train_speed_gpu.json")
    if not rows:
        return []
    return [
        "## On a GPU",
        "`python benchmarks/random_weights.py qwen3-1.7b DIR`, then `python "
        "benchmarks/train_speed.py --model DIR --dtype bfloat16 --micro-batch 8 --shapes "
        "512/64,1024/64,64/64 --checkpointing off --no-random --out "
        "benchmarks/results/train_speed_gpu.json`. MiB is what the allocator "
        "held at most. **These are of a version before the fixes that they led to, and no GPU has "
        "measured those yet.** Micro-batches of 8 conversations leave this card waiting for the "
        "CPU to launch operations, and our step launches a forward pass more than ordinary "
        "fine-tuning. Since then: switching adapters off no longer visits every weight (which a "
        "profile put at most of a LoRA decoder's prefill), and Liger's loss gives way to ours "
        "where targets are few, for it then runs in chunks of a few rows. What "
        "remains is to be met with larger batches, for which the memory saved leaves room.",
        f"Measured on {', '.join(sorted({row['machine'] for row in rows}))}.",
        *_speed_tables(rows),
    ]


def _profile() -> list[str]:
    found = _read("profile_step.json")
    if not found:
        return []
    kinds = {
        "products": ("matrix products",),
        "attention": ("attention",),
        "elementwise, norms, softmax": ("elementwise and norms", "softmax and loss"),
        "gradients added": ("gradients added",),
        "copies, casts": ("copies and casts",),
        "rest": ("allocation", "autograd"),
    }
    rows = []
    for row in found["rows"]:
        parts = [sum(row["seconds"].get(kind, 0) for kind in of) for of in kinds.values()]
        whole = sum(row["seconds"].values())
        counted = parts[0] + parts[1]
        names = [row["model"], row["workload"], str(row["conversations"]), row["dtype"]]
        names += [ADAPTERS[row["adapter"]], "yes" if row["checkpointing"] else "no"]
        names += [NAMES[row["method"]]]
        rates = [f"{row['flops'] / 1e9 / counted:.0f}", f"{row['matmul_gflops']:.0f}"]
        rows.append([*names, f"{whole:.2f}", *(f"{part:.2f}" for part in parts), *rates])
    return [
        "## Where a step's time goes",
        "`OMP_NUM_THREADS=2 python benchmarks/profile_step.py --model "
        ".cache/models/smollm2-135m-instruct` sums the self time of torch's profiler by kind of "
        "operation, in seconds, over one micro-batch. A FLOP bound counts matrix products and "
        "attention only; GFLOP/s is of these, and matmul is what a plain product of the model's "
        "MLP shape reached just before. Our attention runs as products and a softmax, and is "
        "counted there; the hand-written loop's is one fused operation. In bfloat16 products run "
        "so fast that the rest, which moves memory and gains little from the shorter type, takes "
        "about half of our step: that keeps a step below the rate of a plain product. And sharing "
        "saves less of the rest than of the products: the prefill's norms, activations and softmax "
        f"stay, and K/V are copied{_saved(found['rows'])}. That keeps full fine-tuning below the "
        "bound, and with checkpointing, whose bound is higher, LoRA in bfloat16 too.",
        f"Measured on {found['machine']}.",
        _table(
            [
                *("model", "P/R", "batch", "dtype", "adapter", "checkpointing"),
                *("method", "seconds"),
                *kinds,
                *("GFLOP/s", "matmul"),
            ],
            rows,
            texts=7,
        ),
    ]


def _saved(rows: Sequence[dict[str, Any]]) -> str:
    """How much less of products and of the rest ours takes, where it is far from the bound."""
    seconds = {
        row["method"]: row["seconds"]
        for row in rows
        if (row["workload"], row["dtype"], row["adapter"]) == ("256/64", "bfloat16", "none")
    }
    if set(seconds) != {"sft", "prefillshare"}:
        return ""
    counted = ("matrix products", "attention")
    products = {m: sum(found.get(kind, 0) for kind in counted) for m, found in seconds.items()}
    rest = {m: sum(found.values()) - products[m] for m, found in seconds.items()}
    saved = [1 - part["prefillshare"] / part["sft"] for part in (products, rest)]
    return (
        f" (256/64, full, bfloat16, with checkpointing: {saved[0]:.0%} of the products' time goes, "
        f"and {saved[1]:.0%} of the rest's)"
    )


def _decoders() -> list[str]:
    found = _read("multi_decoder.json")
    if not found:
        return []
    rows = [
        [
            row["dtype"],
            str(row["batch"]),
            f"{row['separate_s']:.1f}",
            f"{row['together_s']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['bound']:.2f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['prefill_gflops']:.0f}",
            f"{row['decoder_gflops']:.0f}",
        ]
        for row in found["rows"]
    ]
    header = ["dtype", "batch", "s one by one", "s on one prefill", "times as fast", "bound"]
    header += ["of the bound", "GFLOP/s, prefill", "GFLOP/s, decoder"]
    return [
        "## Several decoders on one prefill",
        f"`python benchmarks/multi_decoder.py`: {found['decoders']} LoRA decoders on "
        f"{found['prompt']} prompt and {found['response']} response tokens a conversation. Seconds "
        f"are of a step of all decoders, medians of {found['rounds']} interleaved rounds. The "
        "bound is by FLOPs: it takes for granted that a FLOP of a decoder takes as long as one of "
        "the prefill. A decoder runs few tokens in many small operations. Where the processor "
        "multiplies matrices fast (bfloat16, with instructions for it) what each operation costs "
        "by itself shows, and less so in larger batches: the two rates say how far.",
        f"Measured on {found['machine']}.",
        _table(header, rows, texts=1),
    ]


def _long_prompt() -> list[str]:
    found = _read("long_prompt.json")
    if not found:
        return []
    rows = []
    for name, title in (("prefillshare", "ours"), ("full_prompt", "plain fine-tuning")):
        case = found[name]
        measured = f"{case['measured_mib']:,}" if "measured_mib" in case else "not run"
        seconds = f"{case['seconds']:.0f}" if "seconds" in case else ""
        rows.append([title, measured, f"{case['estimated_mib']:,}", seconds])
    return [
        "## A long prompt",
        "`OMP_NUM_THREADS=2 python benchmarks/long_prompt.py`: LoRA on SmolLM2-135M, one row of "
        f"{found['prompt']:,} prompt and {found['response']} response tokens, activation "
        f"checkpointing, the base in chunks of {found['budget_mib']:.0f} MiB of activations.",
        f"Measured on {found['machine']}.",
        _table(["", "measured peak MiB", "estimated MiB", "seconds with loading"], rows, texts=1),
    ]


def _memory_estimate() -> list[str]:
    found = _read("memory_estimate.json")
    if not found:
        return []
    rows = [
        [
            *name.split(" ", 1),
            f"{row['estimated_mib']:,}",
            f"{row['measured_mib']:,}",
            f"{row['off']:+.1%}",
            row["machine"].rpartition(", ")[2] if "NVIDIA" in row["machine"] else row["machine"],
        ]
        for name, row in found.items()
    ]
    return [
        "## Estimated and measured memory",
        "`python benchmarks/memory_estimate.py [--model DIR] [--cases …]` puts "
        "`prefillshare estimate` beside the peak of real steps: on a CPU resident memory less that "
        "of interpreter and libraries, on a GPU what the allocator held. `paper-*` is a "
        "micro-batch of recipes/paper.yaml; shapes other than SmolLM2's have random weights "
        "(`benchmarks/random_weights.py`).",
        _table(["model", "case", "estimated MiB", "measured MiB", "off", "machine"], rows, texts=2),
    ]
