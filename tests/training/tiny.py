"""A tiny decoder, its base and conversations that train in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tests.data.helpers import tiny_tokenizer, write_jsonl
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefillshare_train.core.attention import ATTENTION_NAME
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.trainer import CacheConditionedTrainer

VOCAB = 64


def config() -> LlamaConfig:
    """Two layers, grouped heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def model(seed: int = 0) -> nn.Module:
    """A random causal LM in float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config(), dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )


def lora(seed: int = 0, **options: Any) -> nn.Module:
    """The random model with adapters."""
    base = model(seed)
    torch.manual_seed(seed + 1)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, LoraConfig(**settings))


def save_base(folder: Path, seed: int = 0) -> Path:
    """A tiny base with its tokenizer, as a checkpoint folder."""
    tokenizer = tiny_tokenizer()
    settings = config()
    settings.vocab_size = len(tokenizer)
    settings.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_recipe(folder: Path, training: dict[str, Any], **changes: Any) -> Path:
    """A LoRA recipe over a tiny base, with thirty rows of its own; `training` is added to it."""
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30)]
    values = {
        "base": {"model": str(save_base(folder / "base")), "dtype": "float32"},
        "decoder": {"adapter": "lora", "lora": {"r": 4, "target_modules": "all-linear"}},
        "data": {
            "train": {"source": str(write_jsonl(folder / "rows.jsonl", rows))},
            "eval_fraction": 0.2,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "logging_steps": 1,
            "per_device_train_batch_size": 3,
            "report_to": "none",
            "disable_tqdm": True,
            **training,
        },
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def conversations(count: int, seed: int = 0) -> list[Conversation]:
    """One-turn and two-turn conversations of mixed lengths whose response repeats its prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 4 + (number * 7) % 13
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        ids = [*prompt, *prompt[:3], 2]
        turns = [Turn(length, length + 4, 1)]
        if number % 3 == 0:
            ids += [*prompt[:5], *prompt[:2], 2]
            turns.append(Turn(length + 9 if length >= 5 else len(ids) - 3, len(ids), 1))
        made.append(Conversation(tuple(ids), tuple(turns)))
    return made


def arguments(folder: Path, **options: Any) -> CacheConditionedConfig:
    """Trainer arguments for a few quick steps."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **options,
    }
    return CacheConditionedConfig(output_dir=str(folder), **settings)


def full_trainer(folder: Path, *, rows: int = 24, **options: Any) -> CacheConditionedTrainer:
    """Full fine-tuning over a frozen copy of the same weights."""
    decoder = model()
    base = copy.deepcopy(decoder) if options.get("method") != "full_prompt" else None
    return CacheConditionedTrainer(
        decoder,
        arguments(folder, **options),
        base=base,
        train_dataset=conversations(rows),
        eval_dataset=conversations(9, seed=5),
    )


def losses(trainer: CacheConditionedTrainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
