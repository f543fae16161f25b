"""A tiny base and decoders over it, and lm-eval's requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tests.data.helpers import write_jsonl
from tests.training import tiny
from transformers import AutoModelForCausalLM

from prefillshare_train.evaluation.lm_eval_model import PrefillShareLM
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import run_training

RECIPE = """
base: {{model: {base}, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}}}
training: {{output_dir: {out}, max_steps: 4, learning_rate: 0.05, report_to: none,
           per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true}}
"""


def make_decoders(folder: Path) -> Path:
    """A base, and LoRA decoders of both methods and one with another boundary trained over it."""
    base = tiny.save_base(folder / "base")
    # A random model with the usual small weights says one token for ever, whatever it is asked.
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(base)
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(12)]
    source = write_jsonl(folder / "rows.jsonl", rows)
    for name, overrides in {
        "decoder": [],
        "full_prompt": ["method=full_prompt"],
        "header": ["boundary=generation_prompt"],
    }.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPE.format(base=base, rows=source, out=folder / name))
        run_training(load_recipe([recipe], overrides))
    return folder


def decoder_of(folder: Path, name: str = "decoder", **options: Any) -> PrefillShareLM:
    return PrefillShareLM(str(folder / name / "decoder"), device="cpu", **options)


def generation(*contexts: str, **gen_kwargs: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, {"max_gen_toks": 12, **gen_kwargs}), 0)
        for context in contexts
    ]


def scoring(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
