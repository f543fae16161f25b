"""Which architectures may share a prompt cache, and why the others may not.

An architecture is accepted when the parity tests (tests/core/test_family_parity.py) prove it:
logits and every gradient equal a plain reference in float64. Everything else is refused by name.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

PROVEN = frozenset(
    {
        "gemma3_text",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""`config.model_type` of the families with a parity test."""

_MLA = "multi-head latent attention caches a compressed state, not keys and values; not proven yet"
_STATE = "its linear-attention or state-space layers carry a recurrent state, which is not K/V"
_REASONS = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2", "longcat_flash"), _MLA),
    **dict.fromkeys(
        (
            *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear"),
            *("lfm2", "mamba", "mamba2", "minimax", "nemotron_h", "qwen3_5", "qwen3_5_moe"),
            *("qwen3_next", "recurrent_gemma", "rwkv", "zamba", "zamba2"),
        ),
        _STATE,
    ),
    "gemma2": "it soft-caps attention logits, which the prompt-cache kernels do not implement",
    "gemma3": "it is multimodal; use the text-only checkpoint (model_type gemma3_text)",
    "llama4_text": "its chunked attention is not implemented",
}
_STATE_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "hybrid")


class UnsupportedModelError(ValueError):
    """The architecture's prompt cache cannot be shared; the message names it and the reason."""


def check_supported(config: PreTrainedConfig) -> None:
    """Accept a model configuration, or say why not.

    Raises:
        UnsupportedModelError: the architecture is known not to work, or nobody has proven it.
    """
    reason = _refusal(config)
    if reason:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be trained on a prompt cache: {reason}. "
            f"Proven families: {', '.join(sorted(PROVEN))}"
        )


def _refusal(config: PreTrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models have no causal prompt cache"
    if config.model_type in _REASONS:
        return _REASONS[config.model_type]
    layers = set(getattr(config, "layer_types", None) or ())
    stateful = sorted(layer for layer in layers if any(s in layer for s in _STATE_LAYERS))
    if stateful:
        return f"{_STATE} (layer types: {', '.join(stateful)})"
    if "chunked_attention" in layers:
        return "its chunked attention is not implemented"
    if getattr(config, "kv_lora_rank", None):
        return _MLA
    if getattr(config, "attn_logit_softcapping", None):
        return _REASONS["gemma2"]
    if getattr(config, "num_kv_shared_layers", None):
        return "some layers reuse another layer's K/V, which is not implemented"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional, so later tokens change the cache of earlier ones"
    if config.model_type not in PROVEN:
        return "no parity test proves it yet (see CONTRIBUTING.md on adding a model family)"
    return None


def position_limit(config: PreTrainedConfig) -> int | None:
    """First position at which RoPE would depend on the length of the batch; None for no limit.

    `dynamic` and `longrope` scaling pick their frequencies from the longest position in the forward
    pass once it exceeds the original context. A base pass over the prompt and a decoder pass over
    the response would then rotate by different frequencies, which is silently wrong.
    """
    limits = []
    for rope in _rope_parameter_sets(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(original or config.max_position_embeddings))
    return min(limits) if limits else None


def _rope_parameter_sets(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """RoPE settings: one set, or one for each layer type (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        return [rope]
    return [value for value in rope.values() if isinstance(value, dict)]
