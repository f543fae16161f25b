"""Training arguments: everything of `transformers.TrainingArguments`, and what the method adds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from prefillshare_train.core.boundary import BoundaryRule


@dataclass
class CacheConditionedConfig(TrainingArguments):
    """Arguments of `CacheConditionedTrainer`.

    `per_device_train_batch_size` counts conversations; they are packed end to end without padding.
    The loss is the mean over all target tokens of the global batch, however it is split.
    """

    method: str = "prefillshare"
    """`prefillshare` trains on the base's prompt cache; `full_prompt` is ordinary fine-tuning on
    the same rows, targets and loss, the baseline of every comparison."""
    boundary: str = "last_token"
    """Who runs the last prompt tokens: `last_token`, `generation_prompt`, `block_aligned:B` or
    `ratio:r`."""
    shard_base: bool = False
    """Share a fully trained decoder's frozen base out over the ranks (FSDP2 and ZeRO-3 only), where
    each would otherwise keep all of it. A LoRA decoder's base is the model, sharded as that is."""
    share_prefix_from: int = 64
    """Prompts of a micro-batch that begin with the same tokens, at least this many, are prefilled
    once up to there (one system prompt, one list of tools); 0 never does. The log says what it
    saves."""
    prefill_memory_mib: float | None = None
    """What the base's activations may take in one pass; longer prompts are run in chunks. null runs
    all prompts of a micro-batch in one."""
    offload_prompt_cache: bool = False
    """Keep the prompts' K/V in host memory between prefill and decode, a layer at a time on the
    accelerator. Needs activation checkpointing, without which every layer's would stay there."""
    generate_every: int = 0
    """Measure exact match by generating answers every this many steps; 0 never does."""
    generate_rows: int = 32
    """Evaluation turns to answer each time."""
    generate_max_new_tokens: int = 256
    """Longest answer in tokens."""
    peak_tflops: float | None = None
    """What one device reaches at best, in TFLOP/s; when given, MFU is logged."""
    measure_peak: bool = False
    """Measure `peak_tflops` before training, as the rate of a plain product of the decoder's MLP
    shape in the dtype that products run in: what this machine reaches, not its data sheet."""

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # transformers takes bf16, and accelerate makes a process group, only when told that the
            # CPU is meant; accelerate leaves DeepSpeed out when told.
            self.use_cpu = not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
            if "LOCAL_RANK" in os.environ:
                self.ddp_backend = self.ddp_backend or "gloo"
            self.dataloader_pin_memory = False
        super().__post_init__()
        if self.method not in ("prefillshare", "full_prompt"):
            raise ValueError(f"method {self.method!r} is neither prefillshare nor full_prompt")
        BoundaryRule.parse(self.boundary)
        if self.offload_prompt_cache and not self.activation_checkpointing:
            raise ValueError(
                "offload_prompt_cache needs activation_checkpointing: without it the backward pass "
                "keeps every layer's K/V on the accelerator"
            )
        if self.share_prefix_from < 0:
            raise ValueError(f"share_prefix_from must be 0 or more; found {self.share_prefix_from}")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported; the chunked loss has none")
        # Batches are packed rows, not columns that a model's signature could filter.
        self.remove_unused_columns = False
        # A loss that is not finite must stop the run, not be replaced by an average.
        self.logging_nan_inf_filter = False
        if self.activation_checkpointing:  # the new name of gradient_checkpointing
            given: Any = self.activation_checkpointing_kwargs
            options: dict[str, Any] = dict(given or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(
                    "gradient_checkpointing_kwargs.use_reentrant must be false: reentrant "
                    "checkpointing drops gradients of inputs passed by keyword"
                )
            self.activation_checkpointing_kwargs = options
            self.gradient_checkpointing_kwargs = options
