"""The memory estimate beside the measured peak of real steps, each in a process of its own.

    python benchmarks/memory_estimate.py [--model .cache/models/smollm2-135m-instruct] [--quick]

Measured is resident memory at its highest, less that of the interpreter and libraries (on CUDA: the
allocator's peak). glibc keeps freed blocks for later use, which is no memory that a step needs: the
measuring processes run with MALLOC_* variables that have it return them. Writes
benchmarks/results/memory_estimate.json, where other models' cases stay; exits with 1 where an
estimate is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine

RESULTS = Path(__file__).parent / "results" / "memory_estimate.json"
TOLERANCE = 0.15
FULL = {"adapter": "none", "dtype": "float32"}
LORA = {"adapter": "lora", "lora": {"r": 16, "target_modules": "all-linear"}}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"decoder": LORA},
    "lora-bf16": {"decoder": LORA, "training": {"bf16": True}},
    "lora-full_prompt": {"decoder": LORA, "method": "full_prompt"},
    "full": {"decoder": FULL},
    "full-accumulate": {"decoder": FULL, "training": {"gradient_accumulation_steps": 2}},
    "full-checkpointing": {"decoder": FULL, "training": {"activation_checkpointing": True}},
    "lora-long": {"decoder": LORA, "lengths": [4096, 128, 1]},
    "lora-long-chunked": {
        "decoder": LORA,
        "lengths": [4096, 128, 1],
        "training": {"prefill_memory_mib": 8},
    },
}
# A micro-batch of recipes/paper.yaml, 1024 tokens of which half are prompt.
PAPER = {"bf16": True, "activation_checkpointing": True, "gradient_accumulation_steps": 2}
GPU_CASES: dict[str, dict[str, Any]] = {
    "paper-full": {"decoder": FULL, "lengths": [512, 512, 1], "training": PAPER},
    "paper-lora": {
        "decoder": {"adapter": "lora", "lora": {"r": 32, "target_modules": "all-linear"}},
        "lengths": [512, 512, 1],
        "training": PAPER,
    },
}
ALL_CASES = CASES | GPU_CASES
QUICK = ("lora", "full", "lora-full_prompt")


def recipe_of(model: str, case: dict[str, Any]) -> Any:
    from prefillshare_train.training.recipe import parse_recipe

    training = {"output_dir": "runs/memory_estimate", "max_steps": 2, "max_grad_norm": 0.0}
    training |= {"save_strategy": "no", "disable_tqdm": True, "share_prefix_from": 0}
    training |= {"report_to": "none", "train_sampling_strategy": "sequential"}
    training["per_device_train_batch_size"] = case.get("lengths", [512, 64, 4])[2]
    return parse_recipe(
        {
            "base": {"model": model, "dtype": "bfloat16"},
            "data": {"train": {"source": "unused"}},
            "decoder": case["decoder"],
            "method": case.get("method", "prefillshare"),
            "training": {**training, **case.get("training", {})},
        }
    )


def conversations(case: dict[str, Any], steps: int) -> list[Any]:
    import torch

    from prefillshare_train.core.spans import Conversation, Turn

    draw = torch.Generator().manual_seed(0)

    def rows(prompt: int, response: int, count: int) -> list[Any]:
        return [
            Conversation(
                tuple(torch.randint(100, 40_000, (prompt + response,), generator=draw).tolist()),
                (Turn(prompt, prompt + response),),
            )
            for _ in range(count)
        ]

    prompt, response, batch = case.get("lengths", [512, 64, 4])
    found = rows(prompt, response, batch * steps)
    if "first_lengths" in case and steps > 1:
        found = rows(*case["first_lengths"], batch) + found[batch:]
    return found


def estimated(model: str, case: dict[str, Any]) -> dict[str, int]:
    import torch
    from transformers import AutoConfig

    from prefillshare_train.training.estimate import estimate_memory, model_sizes, step_memory

    recipe = recipe_of(model, case)
    arguments, config = recipe.training_arguments(), AutoConfig.from_pretrained(model)
    gpu = torch.cuda.is_available()
    step = step_memory(recipe, arguments, config, conversations(case, 1), accelerator=gpu)
    sizes = model_sizes(recipe, config)
    return estimate_memory(recipe, arguments, sizes, step, parallel="one_gpu", ranks=1)


def _train(sender: Any, model: str, case: dict[str, Any]) -> None:
    import torch

    from prefillshare_train.training.metrics import peak_memory_mib
    from prefillshare_train.training.run import build_models
    from prefillshare_train.training.trainer import CacheConditionedTrainer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = recipe_of(model, case)
    arguments = recipe.training_arguments()
    _load_libraries(arguments)
    libraries = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    decoder, base, _ = build_models(recipe, arguments)
    # Two optimizer steps: in the second the optimizer's state is there from the beginning.
    rows = conversations(case, 2 * arguments.gradient_accumulation_steps)
    trainer = CacheConditionedTrainer(decoder, arguments, base=base, train_dataset=rows)
    if not torch.cuda.is_available():
        # Loading maps the weights' file beside the weights: a higher peak, and not a step's.
        Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    peak = peak_memory_mib() if torch.cuda.is_available() else _high_water_mark()
    sender.send(peak - libraries / 2**20)


def _high_water_mark() -> float:
    """Highest resident memory since it was reset, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _load_libraries(arguments: Any) -> None:
    """Train a toy for two steps: half of what is imported is imported on the way."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefillshare_train.core.spans import Conversation, Turn
    from prefillshare_train.training.trainer import CacheConditionedTrainer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    toy = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    adapted = get_peft_model(toy, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [Conversation(tuple(range(9)), (Turn(5, 9),))] * 32
    plain = dataclasses.replace(arguments, method="full_prompt")
    CacheConditionedTrainer(adapted, plain, train_dataset=rows).train()
    gc.collect()


def measured(model: str, case: dict[str, Any]) -> float:
    """MiB; the process is fresh, so that nothing of another case is in it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    os.environ["MALLOC_ARENA_MAX"] = "1"
    process = context.Process(target=_train, args=(sender, model, case))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only")
    parser.add_argument("--cases", nargs="*", choices=ALL_CASES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    worst = 0.0
    model = Path(options.model).name
    for name in options.cases or (QUICK if options.quick else CASES):
        case = ALL_CASES[name]
        parts = estimated(options.model, case)
        guess, real = sum(parts.values()) / 2**20, measured(options.model, case)
        off = guess / real - 1
        worst = max(worst, abs(off))
        results[f"{model} {name}"] = {
            "machine": machine(),
            "estimated_mib": round(guess),
            "measured_mib": round(real),
            "off": round(off, 3),
            "parts_mib": {key: round(value / 2**20) for key, value in parts.items()},
        }
        write_json(options.out, results)
        print(f"{name:<20} estimated {guess:7.0f} MiB, measured {real:7.0f} MiB, {off:+.1%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
