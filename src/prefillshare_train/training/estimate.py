"""Memory and time of a recipe before it is run, for one GPU and for each way of using several."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefillshare_train.core.attention import ATTENTION_NAME
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.devices import default_device
from prefillshare_train.core.forward import causal_lm_of
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.recipe import Recipe
from prefillshare_train.training.step_memory import StepMemory, simulate_step

_ADAM = 8  # bytes a trained parameter: two float32 moments
_MIN_CHUNK = 64
_BUCKET = 1 << 30  # DeepSpeed's reduce and gather buckets: 5e8 elements of two bytes each
PARALLEL = ("one_gpu", "ddp", "zero2", "fsdp2", "zero3", "zero3_offload")
"""Parallel configurations, by the names of their files in recipes/accelerate."""


@dataclass(frozen=True)
class ModelSizes:
    """Parameters, counted.

    Attributes:
        model: of the whole model.
        trained: of what is trained, all of it or the adapters.
        largest: of the embeddings and head, or of a layer, whichever is more: what a sharded model
            gathers at once.
    """

    model: int
    trained: int
    largest: int


def model_sizes(recipe: Recipe, config: PreTrainedConfig) -> ModelSizes:
    """Count the parameters of a recipe's models."""
    model = build_on_meta(recipe, config, config.num_hidden_layers)
    causal_lm: Any = causal_lm_of(model)
    layer = sum(p.numel() for p in causal_lm.base_model.layers[0].parameters())
    named = causal_lm.named_parameters()
    frozen = sum(p.numel() for n, p in named if ".lora_" not in n)
    outside = frozen - sum(
        p.numel() for n, p in causal_lm.base_model.layers.named_parameters() if ".lora_" not in n
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSizes(frozen, trained, max(layer, outside))


def build_on_meta(recipe: Recipe, config: PreTrainedConfig, layers: int) -> nn.Module:
    """The recipe's decoder with so many layers, without memory."""
    with torch.device("meta"):
        if recipe.decoder.adapter == "none":
            return _causal_lm(config, layers, recipe.decoder.dtype)
        model = _causal_lm(config, layers, recipe.base.dtype)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe.decoder.lora))


def _causal_lm(config: PreTrainedConfig, layers: int, dtype: str) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION_NAME
    )


def step_memory(
    recipe: Recipe,
    arguments: CacheConditionedConfig,
    config: PreTrainedConfig,
    conversations: Sequence[Conversation],
    *,
    accelerator: bool,
    parallel: str = "one_gpu",
) -> StepMemory:
    """Simulate one micro-batch; see `simulate_step`.

    Where a full decoder's weights are sharded, or DeepSpeed runs, mixed precision means weights
    that are in half precision already, and not autocast's copies of them beside the float32 ones.
    """
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    full = recipe.decoder.adapter == "none"
    if mixed is not None and full and parallel not in ("one_gpu", "ddp"):
        half: Any = str(mixed).removeprefix("torch.")
        recipe = dataclasses.replace(
            recipe, decoder=dataclasses.replace(recipe.decoder, dtype=half)
        )
        mixed = None

    def make(layers: int) -> tuple[nn.Module, Any]:
        decoder = build_on_meta(recipe, config, layers)
        if recipe.method == "full_prompt":
            return decoder, "none"
        if recipe.decoder.adapter == "lora":
            return decoder, None
        return decoder, _causal_lm(config, layers, recipe.base.dtype)

    chunk = None
    if arguments.prefill_memory_mib is not None:
        chunk = prefill_chunk_tokens(arguments.prefill_memory_mib, config, recipe.base.dtype)
    batch = pack(
        conversations,
        BoundaryRule.parse(recipe.boundary),
        recipe.method,
        share_from=arguments.share_prefix_from or None,
        chunk_tokens=chunk,
    )
    return simulate_step(
        make,
        batch,
        layers=config.num_hidden_layers,
        checkpointing=bool(arguments.activation_checkpointing),
        autocast=mixed,
        accelerator=accelerator,
    )


def estimate_memory(
    recipe: Recipe,
    arguments: CacheConditionedConfig,
    sizes: ModelSizes,
    step: StepMemory,
    *,
    parallel: str,
    ranks: int,
) -> dict[str, int]:
    """Bytes on one GPU, by what takes them, at the step's highest point.

    Args:
        parallel: one of `PARALLEL`.
        ranks: GPUs; 1 for `one_gpu`.
    """
    lora = recipe.decoder.adapter == "lora"
    base_item = getattr(torch, recipe.base.dtype).itemsize
    trained_item = 4 if lora else getattr(torch, recipe.decoder.dtype).itemsize
    deepspeed = parallel.startswith("zero")
    half = bool(arguments.bf16 or arguments.fp16)
    if deepspeed and half:
        trained_item = 2  # DeepSpeed trains in the half precision, over float32 master weights
    optimizer_item = _ADAM + (4 if deepspeed and half else 0)
    sharded = ranks if parallel in ("fsdp2", "zero3", "zero3_offload") else 1
    optimizer_ranks = ranks if deepspeed else sharded

    frozen = sizes.model * base_item if lora or recipe.method == "prefillshare" else 0
    base_sharded = sharded if lora or arguments.shard_base else 1
    parameters = sizes.trained * trained_item
    found = {
        "base": frozen // base_sharded,
        "trained parameters": parameters // sharded,
        "gradients": parameters // optimizer_ranks,
        "optimizer (AdamW)": sizes.trained * optimizer_item // optimizer_ranks,
        "gathered and buckets": 0,
        "prompt cache": 0 if arguments.offload_prompt_cache else step.prompt_cache,
        "activations": step.activations,
    }
    if sharded > 1:
        item = 2 if half else trained_item
        # The unit that runs and the next, which is being fetched.
        found["gathered and buckets"] = 2 * sizes.largest * item
    if deepspeed:
        found["gathered and buckets"] += min(_BUCKET, parameters)
    elif parallel == "ddp":
        found["gathered and buckets"] = parameters  # DDP's buckets hold the gradients once more
    if parallel == "zero3_offload":
        for name in ("trained parameters", "gradients", "optimizer (AdamW)"):
            found[name] = 0
        found["base"] = 0 if lora else found["base"]
    elif parallel == "one_gpu" and arguments.gradient_accumulation_steps == 1:
        # Gradients come up while activations go: both are never at their highest together.
        found["activations"] = step.with_gradients - found["gradients"]
    during_prefill = step.prefill - found["activations"] - found["gradients"]
    if during_prefill > 0:
        found["activations"] += during_prefill
    return found


def prefill_chunk_tokens(
    budget_mib: float, model: PreTrainedModel | PreTrainedConfig, dtype: str | None = None
) -> int:
    """Tokens that one pass of the base may run, for its activations to stay within a budget.

    A layer of the base holds, at its highest, the residual stream and its norm in float32 and in
    its own precision, and three of the MLP's width; attention's scores are per block of queries.
    """
    config: Any = model if isinstance(model, PreTrainedConfig) else model.config
    item = getattr(torch, dtype).itemsize if dtype else model.dtype.itemsize  # type: ignore[union-attr]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = (2 * heads + 4 * config.num_key_value_heads) * head_dim
    width = 4 * config.hidden_size + max(3 * config.intermediate_size, attention)
    token = width * item + 8 * config.hidden_size
    return max(_MIN_CHUNK, int(budget_mib * 2**20 / token))


def precision_line(recipe: Recipe) -> str:
    """In which precision a recipe was counted, and that GPUs may choose another."""
    mixed = recipe.training_arguments().mixed_precision
    line = f"counted with base.dtype {recipe.base.dtype}, mixed precision {mixed}"
    if recipe.base.dtype_is_auto and default_device().type == "cpu":
        line += (
            "; base.dtype is auto, which this machine without a GPU decided: set "
            "base.dtype=bfloat16 for GPUs that multiply in it"
        )
    return line


def training_flops(
    recipe: Recipe, arguments: CacheConditionedConfig, config: PreTrainedConfig, rows: Any
) -> float:
    """FLOPs of one epoch over these conversations."""
    with torch.device("meta"):
        stack, head = matmul_parameters(AutoModelForCausalLM.from_config(config))
    layout = pack(
        rows,
        BoundaryRule.parse(recipe.boundary),
        recipe.method,
    )["layout"]
    return float(
        step_flops(
            layout,
            stack=stack,
            head=head,
            config=config,
            trains_base_weights=recipe.decoder.adapter == "none",
            checkpointing=bool(arguments.activation_checkpointing),
        )
    )
