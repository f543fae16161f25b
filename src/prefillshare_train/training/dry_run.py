"""What a recipe would do, found out without touching any weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation
from prefillshare_train.training.recipe import LoadedRecipe, Recipe
from prefillshare_train.training.run import prepare_data

_ADAM_BYTES = 8  # two float32 moments a trained parameter


def dry_run_report(loaded: LoadedRecipe) -> str:
    """Check a recipe to its end short of weights, and say what it would train on and need.

    Raises:
        RecipeError, DataError, UnsupportedModelError: what the run itself would raise.
    """
    recipe = loaded.recipe
    arguments = recipe.training_arguments()
    data = prepare_data(loaded)
    config = AutoConfig.from_pretrained(recipe.base_location, revision=recipe.base.revision)
    batch = arguments.per_device_train_batch_size
    longest = sorted(data.train, key=lambda c: len(c.token_ids))[-batch:]
    memory = estimate_memory(recipe, config, longest)
    lines = [
        str(data.report),
        "",
        f"method {recipe.method}, boundary {recipe.boundary}, adapter {recipe.decoder.adapter}",
        f"memory for {batch} of the longest conversations a micro-batch (activations left out):",
        *(f"  {name:<22} {size / 2**20:>10.0f} MiB" for name, size in memory.items()),
        f"  {'together':<22} {sum(memory.values()) / 2**20:>10.0f} MiB",
        "dry run ok",
    ]
    return "\n".join(lines)


def estimate_memory(
    recipe: Recipe, config: PreTrainedConfig, conversations: list[Conversation]
) -> dict[str, int]:
    """Bytes of everything that lives through a step, but for activations.

    Args:
        conversations: one micro-batch.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        if recipe.decoder.adapter == "lora":
            from peft import LoraConfig, get_peft_model

            adapted = get_peft_model(
                model, LoraConfig(task_type="CAUSAL_LM", **recipe.decoder.lora)
            )
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        else:
            trained = parameters
    base_size = getattr(torch, recipe.base.dtype).itemsize
    lora = recipe.decoder.adapter == "lora"
    trained_size = 4 if lora else getattr(torch, recipe.decoder.dtype).itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * base_size
    layout = pack(conversations, BoundaryRule.parse(recipe.boundary), recipe.method)["layout"]
    shares_base = lora or recipe.method == "prefillshare"
    return {
        "base": parameters * base_size if shares_base else 0,
        "trained parameters": trained * trained_size,
        "gradients": trained * trained_size,
        "optimizer (AdamW)": trained * _ADAM_BYTES,
        "prompt cache": sum(layout.prompt_lengths) * token,
    }
