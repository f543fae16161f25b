"""FLOPs of training steps, counted from shapes.

A matrix product of (m, k) and (k, n) is 2mkn FLOPs. A forward pass costs 2 FLOPs a parameter and
token, the gradient of its inputs 2 more, that of its weights 2 more. Attention costs 4 H D a
query-key pair and layer forward (two products), and twice that backward; once over the prompt
cache, whose K/V are constants and get no gradient. Norms, RoPE and the optimizer are left out, as
usual for model FLOPs (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefillshare_train.core.packing import BatchLayout


def matmul_parameters(causal_lm: PreTrainedModel) -> tuple[int, int]:
    """Weights that a token is multiplied with: in the decoder stack, and in the LM head.

    Embeddings and adapters are left out; of a mixture's experts, those that a token is routed to
    are counted.
    """
    head = causal_lm.get_output_embeddings()
    head_weights = _weight_of(head).numel() if head is not None else 0
    stack = 0
    for name, parameter in causal_lm.base_model.named_parameters():
        if ".lora_" in name or parameter.dim() < 2 or "embed" in name or name.endswith("bias"):
            continue
        share = 1.0
        if parameter.dim() == 3:  # stacked experts
            share = _active_share(causal_lm.config)
        stack += int(parameter.numel() * share)
    return stack, head_weights


def _weight_of(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module).weight


def _active_share(config: PreTrainedConfig) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 1)
    return float(config.num_experts_per_tok / experts)


def step_flops(
    layout: BatchLayout,
    *,
    stack: int,
    head: int,
    config: PreTrainedConfig,
    trains_base_weights: bool,
    checkpointing: bool,
) -> int:
    """FLOPs of one micro-batch: the base's prefill, and the decoder's forward and backward.

    Args:
        layout: of the packed batch; a `full_prompt` batch has no prefill tokens.
        stack, head: from `matmul_parameters`.
        config: the model's configuration.
        trains_base_weights: full fine-tuning; an adapter's own products are left out.
        checkpointing: the stack's forward runs twice.
    """
    layers = config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = 4 * heads * head_dim
    # The base's last layer ends at its keys and values: of its products only Q, K and V are run.
    prefill_tokens = layout.prefill.tokens
    projections = config.hidden_size * (heads + 2 * kv_heads) * head_dim
    base = 2 * prefill_tokens * (stack * (layers - 1) / layers + projections)
    base += pair * (layers - 1) * layout.prefill_pairs

    tokens = sum(group.count * group.query_length for group in layout.decode_groups)
    past_pairs = sum(g.count * g.query_length * g.past_length for g in layout.decode_groups)
    forward = 2 * stack * tokens + pair * layers * layout.decode_pairs
    # Gradients of inputs, and of weights where they are trained.
    slopes = 4 if trains_base_weights else 2
    backward = slopes * stack * tokens
    backward += pair * layers * (2 * layout.decode_pairs - past_pairs)
    repeats = 2 if checkpointing else 1
    return round(base + repeats * forward + backward + (2 + slopes) * head * layout.response_tokens)
