"""Training D LoRA decoders on one prefill, beside D runs one after another and the bound on FLOPs.

    python benchmarks/multi_decoder.py [--model .cache/models/smollm2-135m-instruct] [--decoders 4]
                                       [--prompt 512] [--response 64] [--batch 4] [--steps 8]

Both train the same decoders on the same synthetic rows in this process. A run's time is the sum of
its steps' but the first. The bound is the ratio of FLOPs by the formula in docs/method.md: D
separate runs prefill D times, one run of D decoders once. Writes
benchmarks/results/multi_decoder.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.decoder_set import twin_of
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.lockstep import Lockstep, TakeTurns, generator_states
from prefillshare_train.training.trainer import CacheConditionedTrainer
from prefillshare_train.workloads.machine import machine

RESULTS = Path(__file__).parent / "results" / "multi_decoder.json"


class Clock(TrainerCallback):
    """When the first step ended and when the last did."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def rows(options: argparse.Namespace) -> list[Conversation]:
    draw = torch.Generator().manual_seed(0)
    length = options.prompt + options.response
    return [
        Conversation(
            tuple(torch.randint(100, 40_000, (length,), generator=draw).tolist()),
            (Turn(options.prompt, length),),
        )
        for _ in range(options.batch * options.steps)
    ]


def trainer(
    model: torch.nn.Module, options: argparse.Namespace, rank: int, prefill: Any, clock: Clock
) -> CacheConditionedTrainer:
    adapted = get_peft_model(
        model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    arguments = CacheConditionedConfig(
        output_dir="runs/bench-multi-decoder",
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        bf16=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    return CacheConditionedTrainer(
        adapted, arguments, prefill=prefill, train_dataset=rows(options), callbacks=[clock]
    )


def separately(base: Any, options: argparse.Namespace) -> float:
    """Seconds of D runs, one after another."""
    total = 0.0
    for _ in range(options.decoders):
        clock = Clock()
        trainer(twin_of(base), options, 16, None, clock).train()
        total += clock.ends[-1] - clock.ends[0]
    return total


def together(base: Any, options: argparse.Namespace) -> float:
    """Seconds of one run of D decoders."""
    prefill = SharedPrefill(base)
    lockstep: Lockstep[Any] = Lockstep(on_round=prefill.new_round)
    clocks = [Clock() for _ in range(options.decoders)]
    trainers = {}
    for number, clock in enumerate(clocks):
        one = trainer(twin_of(base), options, 16, prefill, clock)
        one.add_callback(TakeTurns(lockstep, str(number)))
        trainers[str(number)] = one
    states = {name: generator_states() for name in trainers}
    lockstep.run({name: one.train for name, one in trainers.items()}, states)
    # From the end of the first round to the end of the last.
    return clocks[-1].ends[-1] - clocks[-1].ends[0]


def bound(options: argparse.Namespace) -> float:
    """FLOPs of D separate steps over those of one step of D decoders."""
    config = AutoConfig.from_pretrained(options.model)
    with torch.device("meta"):
        stack, head = matmul_parameters(AutoModelForCausalLM.from_config(config))

    def flops(method: Any, rule: str) -> int:
        layout = pack(rows(options)[: options.batch], BoundaryRule.parse(rule), method)["layout"]
        sizes = {"stack": stack, "head": head, "config": config}
        return step_flops(layout, **sizes, trains_base_weights=False, checkpointing=False)

    whole = flops("prefillshare", "last_token")
    layout = pack(rows(options)[: options.batch], BoundaryRule.parse("last_token"))["layout"]
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    projections = config.hidden_size * (heads + 2 * config.num_key_value_heads) * head_dim
    base = 2 * layout.prefill.tokens * (stack * (layers - 1) / layers + projections)
    base += 4 * heads * head_dim * (layers - 1) * layout.prefill_pairs
    return options.decoders * whole / (base + options.decoders * (whole - base))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--decoders", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    base = load_causal_lm(options.model, dtype=torch.bfloat16).requires_grad_(False)
    one_by_one, at_once = separately(base, options), together(base, options)
    speedup, limit = one_by_one / at_once, bound(options)
    result = {
        **{key: value for key, value in vars(options).items() if key != "out"},
        "machine": machine(),
        "separate_s": round(one_by_one, 2),
        "together_s": round(at_once, 2),
        "speedup": round(speedup, 3),
        "bound": round(limit, 3),
        "share_of_bound": round(speedup / limit, 3),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{options.decoders} decoders: {one_by_one:.1f} s one by one, {at_once:.1f} s on one "
        f"prefill: {speedup:.2f}x of at most {limit:.2f}x ({speedup / limit:.0%})"
    )


if __name__ == "__main__":
    main()
