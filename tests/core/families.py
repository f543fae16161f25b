"""Tiny random models of every proven family, made to exercise what is special about each.

Sizes are as small as they can be while every mechanism is in play: grouped query heads, windows
shorter than the prompts, head dimensions that differ from hidden size / heads, multipliers,
sinks, experts. Weights are drawn wide enough that attention is far from uniform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.devices import DEVICE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from prefillshare_train.core.attention import ATTENTION_NAME

VOCAB = 97
WINDOW = 16

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def _sizes(**changes: Any) -> dict[str, Any]:
    return _SIZES | changes


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **_sizes(
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "llama_tied": lambda: LlamaConfig(**_sizes(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama_dynamic_rope": lambda: LlamaConfig(
        **_sizes(
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            max_position_embeddings=80,
        )
    ),
    "qwen2": lambda: Qwen2Config(
        **_sizes(
            num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
        )
    ),
    "qwen3": lambda: Qwen3Config(**_sizes(head_dim=10, tie_word_embeddings=True)),
    "mistral": lambda: MistralConfig(**_sizes(sliding_window=WINDOW, head_dim=6)),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_sizes(
            head_dim=10,
            query_pre_attn_scalar=7,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            final_logit_softcapping=5.0,
        )
    ),
    "phi3": lambda: Phi3Config(
        **_sizes(sliding_window=WINDOW, head_dim=8, hidden_size=32, resid_pdrop=0.0)
    ),
    "phi3_longrope": lambda: Phi3Config(
        **_sizes(
            head_dim=8,
            hidden_size=32,
            partial_rotary_factor=0.5,
            original_max_position_embeddings=80,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 8.0],
                "original_max_position_embeddings": 80,
            },
        )
    ),
    "smollm3": lambda: SmolLM3Config(
        **_sizes(
            num_hidden_layers=4,
            no_rope_layers=[1, 0, 1, 0],
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "granite": lambda: GraniteConfig(
        **_sizes(
            embedding_multiplier=3.0,
            logits_scaling=0.4,
            residual_multiplier=0.7,
            attention_multiplier=0.6,
        )
    ),
    "olmo2": lambda: Olmo2Config(**_sizes()),
    "gpt_oss": lambda: GptOssConfig(
        **_sizes(
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_sizes(
            head_dim=8,
            moe_intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=WINDOW,
        )
    ),
}
"""One or two configurations of each proven family, by name."""

FAMILIES = tuple(CONFIGS)


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in eval mode, with prefillshare attention."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    # Experts as plain matrix products: the grouped kernel has no float64.
    config._experts_implementation = "eager"
    # from_config computes in the dtype that it is given; draw in float32 so that every dtype of a
    # seed is the same model.
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms at exactly one and biases at zero hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(DEVICE, dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, Gemma3RMSNorm):
                module.forward = MethodType(_wide_gemma_norm, module)  # type: ignore[method-assign]
    return model


def _wide_gemma_norm(self: Gemma3RMSNorm, x: Tensor) -> Tensor:
    """Gemma's norm without its cast to float32, which would sum its weight's gradient in float32
    and so hide any error below 1e-7."""
    normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return normed * (1.0 + self.weight)


def perturbed(model: PreTrainedModel, scale: float = 0.05, seed: int = 1) -> PreTrainedModel:
    """A copy whose weights all differ: what a decoder is to its base after some training."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * scale)
    return other


def with_lora(model: PreTrainedModel, seed: int = 2, **options: Any) -> PeftModel:
    """The model itself wrapped with LoRA whose both factors are random, so that it matters."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    wrapped = get_peft_model(model, LoraConfig(**(settings | options)))
    assert isinstance(wrapped, PeftModel)
    return wrapped


def reference_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights under transformers' own attention.

    SDPA, since eager attention rounds its softmax to float32; gpt-oss has no SDPA, and its eager
    attention keeps the dtype.
    """
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager" if model.config.model_type == "gpt_oss" else "sdpa")
    return other
