"""A `transformers.Trainer` whose model reads the frozen base's prompt cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from prefillshare_train.core.attention import JOB_KEYWORD, AttentionJob
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract
from prefillshare_train.core.devices import warn_of_slow_products
from prefillshare_train.core.modules import (
    PrefillModule,
    attach_loss_head,
    causal_lm_of,
    check_positions,
    use_prefillshare_attention,
)
from prefillshare_train.core.packing import BatchLayout, Method, pack
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.core.spans import Conversation
from prefillshare_train.training.base_weights import shard_base
from prefillshare_train.training.checkpoints import AtomicCheckpoints
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.estimate import prefill_chunk_tokens
from prefillshare_train.training.evaluation_loop import TokenWeightedEvaluation
from prefillshare_train.training.launch import (
    LaunchError,
    allow_sharding_on_cpu,
    check_agreement,
    check_launch,
    follow_clipping,
    keep_loss_precision,
    shards_parameters,
)
from prefillshare_train.training.metrics import ThroughputMeter, measured_tflops


class TrainingDivergedError(RuntimeError):
    """The loss is not finite; the message names the step and the last good checkpoint."""


def collate(
    conversations: Sequence[Conversation], *, rule: BoundaryRule, method: Method, **plan: int | None
) -> dict[str, Any]:
    """Pack conversations; see `core.packing.pack`. `shift_labels` tells the Trainer that targets
    are already shifted, so that it counts every one of them."""
    batch = pack(conversations, rule, method, **plan)
    batch["shift_labels"] = batch["labels"]
    return batch


def _method(name: str) -> Method:
    return "full_prompt" if name == "full_prompt" else "prefillshare"


class CacheConditionedTrainer(AtomicCheckpoints, TokenWeightedEvaluation, Trainer):
    """Trains a decoder on response tokens only, conditioned on the base's prompt cache.

    Args:
        model: the decoder: a causal LM (full fine-tuning) or a `PeftModel`.
        args: a `CacheConditionedConfig`.
        base: the frozen base, for full fine-tuning; a LoRA decoder's base is the model itself with
            its adapters off, so None. Not read for `method: full_prompt`.
        prefill: in place of `base`, a base that several trainers share.
        train_dataset, eval_dataset: sequences of `Conversation`.
        contract: saved into every checkpoint.
        **kwargs: anything else that `Trainer` takes.

    Raises:
        ValueError: a base is missing, or given where the decoder already carries it; or the model
            asks for a router loss.
        UnsupportedModelError: the architecture's prompt cache cannot be shared.
    """

    args: CacheConditionedConfig

    def __init__(
        self,
        model: nn.Module,
        args: CacheConditionedConfig,
        *,
        train_dataset: Sequence[Conversation] | None = None,
        eval_dataset: Sequence[Conversation] | None = None,
        base: nn.Module | None = None,
        prefill: PrefillModule | None = None,
        contract: Contract | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        use_prefillshare_attention(model)
        self.decoder = causal_lm_of(model)
        if getattr(self.decoder.config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits asks for a load-balancing loss that this trainer does not "
                "compute; set it to False in the model's config"
            )
        self.rule = BoundaryRule.parse(args.boundary)
        self.contract = contract
        self.prefill = prefill or self._prefill_module(model, base, args.method)
        attach_loss_head(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self._warn_of_slow_products()
        self.data_collator = self._collator()
        # compute_loss divides by the tokens of the whole global batch.
        self.model_accepts_loss_kwargs = True
        if args.offload_prompt_cache and self.prefill is not None:
            self.prefill.keep_on = torch.device("cpu")
        self._base = base if self.prefill is not None else None
        if self._base is not None and not args.shard_base:
            self._base.to(self.args.device)
        self.meter = ThroughputMeter(
            self.decoder,
            full=not isinstance(model, PeftModel),
            checkpointing=bool(args.activation_checkpointing),
            peak_tflops=self._measured_peak() if args.measure_peak else args.peak_tflops,
        )

    def _warn_of_slow_products(self) -> None:
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        used = [mixed.get(self.accelerator.mixed_precision, self.decoder.dtype)]
        if self.prefill is not None:
            used.append(self.prefill.causal_lm.dtype)
        for dtype in used:
            warn_of_slow_products(dtype, self.args.device)

    def _measured_peak(self) -> float:
        if self.args.bf16 or self.args.fp16:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        else:
            dtype = self.decoder.dtype
        return measured_tflops(self.decoder.config, self.args.device, dtype)

    # -- processes --------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        allow_sharding_on_cpu()
        super().create_accelerator_and_postprocess()
        check_launch(self.accelerator)
        if self.contract is not None:
            check_agreement(self.contract)
        follow_clipping(self.accelerator, self.args.max_grad_norm)
        keep_loss_precision(self.accelerator)
        if shards_parameters(self.accelerator) and getattr(self.decoder, "is_quantized", False):
            raise LaunchError(
                "a quantised base cannot be shared out over ranks. Launch with "
                "recipes/accelerate/ddp.yaml, or use the plain checkpoint"
            )
        if self.args.generate_every and shards_parameters(self.accelerator):
            raise LaunchError(
                "training.generate_every answers with whole weights, and this run shards them. Set "
                "it to 0 and measure the finished decoder with `prefillshare held-out`"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.prefill is not None and not self._base_placed:
            if self._base is None and shards_parameters(self.accelerator):
                self.prefill.run_through(model)
            elif self._base is not None and self.args.shard_base:
                self.prefill.run_through(shard_base(self._base, self.accelerator))
        self._base_placed = True
        return model, loader

    def _collator(self) -> Callable[[Sequence[Conversation]], dict[str, Any]]:
        """Packs conversations, and plans how the base runs their prompts.

        A base whose parameters are shared out runs each batch in one pass: ranks gather together,
        and plans differ between them.
        """
        args = self.args
        plain = partial(collate, rule=self.rule, method=_method(args.method))
        if self.prefill is None:
            return plain
        if shards_parameters(self.accelerator) and (self.prefill.shares_weights or args.shard_base):
            if args.prefill_memory_mib is not None:
                raise LaunchError(
                    "training.prefill_memory_mib runs prompts in chunks, which a base whose "
                    "parameters are shared out cannot. Set it to null, or keep the base whole: "
                    "training.shard_base=false, or DDP or ZeRO-2 for LoRA"
                )
            return plain
        chunk = None
        if args.prefill_memory_mib is not None:
            chunk = prefill_chunk_tokens(args.prefill_memory_mib, self.prefill.causal_lm)
        return partial(plain, share_from=args.share_prefix_from or None, chunk_tokens=chunk)

    @staticmethod
    def _prefill_module(
        model: nn.Module, base: nn.Module | None, method: str
    ) -> PrefillModule | None:
        if method == "full_prompt":
            return None
        if isinstance(model, PeftModel):
            if base is not None:
                raise ValueError(
                    "a PeftModel carries its base: the adapters are switched off to prefill. "
                    "Leave `base` out"
                )
            return PrefillModule(model)
        if base is None:
            raise ValueError(
                "full fine-tuning needs the frozen base as a second model: pass `base`, or train "
                "a LoRA decoder, which shares one copy of the weights"
            )
        if base is model:
            raise ValueError("`base` is the model being trained; load it a second time")
        return PrefillModule(base)

    # -- one step ---------------------------------------------------------------------------------

    def prompt_cache(self, inputs: dict[str, Any]) -> PromptCache | None:
        """Run the base over a packed batch's prompts; None for `full_prompt`."""
        if self.prefill is None:
            return None
        return self.prefill.prefill_packed(inputs)

    def loss_sums(
        self, model: nn.Module, inputs: dict[str, Any], *, count_correct: bool = False
    ) -> dict[str, Tensor]:
        """Summed loss of a packed batch (`nll`, and `correct` when asked for)."""
        layout: BatchLayout = inputs["layout"]
        check_positions(self.decoder.config, layout.max_position)
        job = AttentionJob(layout.decode_groups, past=self.prompt_cache(inputs))
        sums: dict[str, Tensor] = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            target_index=inputs["target_index"],
            count_correct=count_correct,
            **{JOB_KEYWORD: job},
        )
        return sums

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over target tokens.

        Normalised by `num_items_in_batch`, the target tokens of the whole global batch, so that
        batch 1 x accumulation 8 equals batch 8 x 1; by this batch's own where it is not given.
        """
        sums = self.loss_sums(model, inputs)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is None:
            loss = sums["nll"] / inputs["labels"].numel()
        else:
            loss = sums["nll"] / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, sums) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        with self.meter.step(inputs["layout"]):
            loss = super().training_step(model, inputs, num_items_in_batch)
            # Waits for the device, so that the clock covers the work and not its queueing.
            finite = bool(torch.isfinite(loss))
        if not finite:
            last = self.last_checkpoint()
            raise TrainingDivergedError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}. "
                + (f"The last good checkpoint is {last}. " if last else "Nothing was saved yet. ")
                + "Lower learning_rate, or look at the rows with `prefillshare inspect`"
            )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of a step, by the formula in docs/method.md."""
        return self.meter.flops(inputs["layout"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.drain()}
        super().log(logs, start_time)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.output_folder
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
        (folder / "training_args.json").write_text(self.args.to_json_string())
        if self.contract is not None:
            self.contract.save(folder)
