"""Adapters saved in PEFT's aLoRA format, run as what they are here: LoRA from the boundary on.

An aLoRA layer acts from the invocation tokens on, whose place PEFT finds in the input of its own
forward. Our decoder's pass holds nothing but tokens from the boundary on and does not go through
that forward: without a place to start from, PEFT would leave the adapter out without a word.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel


def run_as_lora(model: PeftModel) -> PeftModel:
    """Let every aLoRA adapter of a model act on all tokens that it is given.

    To be called wherever an adapter was loaded; other adapters are left as they are.

    Returns:
        The model itself.
    """
    configs: dict[str, Any] = dict(model.peft_config)
    named = {
        name for name, config in configs.items() if getattr(config, "alora_invocation_tokens", None)
    }
    if not named:
        return model
    for module in model.modules():
        variants = getattr(module, "lora_variant", None)
        if isinstance(variants, dict):
            for name in named:
                variants.pop(name, None)
    for name in named:
        configs[name].alora_invocation_tokens = None
    return model
