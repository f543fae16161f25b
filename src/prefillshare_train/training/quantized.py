"""A base whose weights are quantised: a checkpoint that bitsandbytes wrote, under LoRA decoders.

The quantised checkpoint is the base: its K/V are what decoders learn to read, and its fingerprint
is in their contracts. So a base is quantised once and saved, and never on the way.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefillshare_train.training.recipe import Recipe, RecipeError

_LIBRARY = "bitsandbytes"


def check_quantization(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Accept a base as it is saved, or say why not.

    Raises:
        RecipeError: the base is quantised and something about it cannot work here.
    """
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    where = f"base.model {recipe.base.model} is quantised"
    method = str(values.get("quant_method", "unknown"))
    if "bitsandbytes" not in method:
        raise RecipeError(
            f"{where} by {method!r}, over which no decoder has been proven. Use the plain "
            "checkpoint, or one that bitsandbytes quantised"
        )
    if importlib.util.find_spec(_LIBRARY) is None:
        raise RecipeError(f"{where} by bitsandbytes, which is missing: pip install {_LIBRARY}")
    if recipe.decoder.adapter == "none":
        raise RecipeError(
            f"{where}, and quantised weights cannot be trained. Set decoder.adapter: lora, or use "
            "the plain checkpoint"
        )
    if values.get("load_in_4bit") and not torch.accelerator.is_available():
        raise RecipeError(
            f"{where} to 4 bits. On CPUs with AVX-512 bitsandbytes packs such weights anew in the "
            "first pass without gradients, which is the base's, and the decoder then reads other "
            "weights. Use 8 bits or an accelerator"
        )
