"""The two halves of a factorised model: a frozen prefill module and a trained decode module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefillshare_train.core.adapters_off import adapters_off
from prefillshare_train.core.attention import (
    ATTENTION_NAME,
    JOB_KEYWORD,
    AttentionJob,
    LastLayerReached,
)
from prefillshare_train.core.devices import warn_of_slow_products
from prefillshare_train.core.families import check_supported, position_limit
from prefillshare_train.core.forward import attach_loss_head, causal_lm_of, run_backbone
from prefillshare_train.core.layout import Segment, SegmentGroup, group_segments, positions_of
from prefillshare_train.core.prefill_plan import PassRecorder, PrefillPlan
from prefillshare_train.core.prompt_cache import PromptCache


def load_causal_lm(
    name_or_path: str,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM whose attention can record and condition.

    Weights are read from safetensors only, so that nothing is ever unpickled.

    Args:
        device: where it is moved to; None leaves it on the CPU, for a trainer to place.

    Raises:
        UnsupportedModelError: the architecture is not one whose prompt cache can be shared; raised
            before any weight is read.
        OSError: there is no such model, or it has no safetensors weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    check_supported(config)
    model = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=ATTENTION_NAME,
        use_safetensors=True,
    )
    if device is not None:
        nn.Module.to(model, device)
        warn_of_slow_products(model.dtype, device)
    return model


def use_prefillshare_attention(model: nn.Module) -> None:
    """Switch a loaded model (PEFT-wrapped or not) to the attention that records and conditions.

    Raises:
        UnsupportedModelError: the architecture is refused, see `families`.
    """
    inner = causal_lm_of(model)
    check_supported(inner.config)
    if inner.config._attn_implementation != ATTENTION_NAME:
        inner.set_attn_implementation(ATTENTION_NAME)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and afterwards every module in the mode it was in.

    `model.train(was_training)` would also set training a part that its user keeps in eval mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_positions(config: PreTrainedConfig, max_position: int) -> None:
    """Refuse positions at which the base and the decoder would rotate K and Q differently.

    Raises:
        ValueError: the position is past the limit; the message says what to lower.
    """
    limit = position_limit(config)
    if limit is not None and max_position >= limit:
        raise ValueError(
            f"position {max_position} is past {limit}, where this model's length-dependent RoPE "
            "scaling would rotate the base's keys and the decoder's queries differently; "
            f"set data.max_length to {limit} or less"
        )


class PrefillModule:
    """The frozen base: runs prompts under no_grad and leaves a prompt cache.

    Deliberately not an `nn.Module`: held by a trainer or a decoder it must not be reached by
    `train()`, `parameters()`, a device move or a checkpoint of its holder.

    Args:
        model: a causal LM of its own (full fine-tuning), or the very `PeftModel` being trained,
            whose adapters are switched off during the base's pass (one copy of the weights).
        stop_early: stop at the last layer's K/V. Set False where parameters are sharded and every
            module's forward hooks must run to their end.

    Attributes:
        keep_on: device that recorded K/V are moved to layer by layer; None leaves them where they
            were computed.
    """

    def __init__(self, model: nn.Module, *, stop_early: bool = True) -> None:
        self.model = model
        self.causal_lm = causal_lm_of(model)
        self.stop_early = stop_early
        self.keep_on: torch.device | None = None
        self._root: nn.Module | None = None
        use_prefillshare_attention(model)
        self._shared = isinstance(model, PeftModel)
        if not self._shared:
            model.requires_grad_(False)
            model.eval()

    def run_through(self, root: nn.Module) -> None:
        """Run prompts by calling `root`, the wrapper that gathers the base's sharded parameters.

        Every call then makes exactly one pass through it, even for a batch without prompt tokens,
        since ranks gather together or wait for ever; and none stops early.
        """
        attach_loss_head(self.model)
        self._root = root
        self.stop_early = False

    @property
    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Device of the base's weights."""
        return self.causal_lm.device

    @property
    def shares_weights(self) -> bool:
        """The base is the model being trained, with its adapters off."""
        return self._shared

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Adapters and dropout off; every flag as it was when the block ends."""
        if not self._shared:
            yield
            return
        assert isinstance(self.model, PeftModel)
        with adapters_off(self.model, through_forward=self._root is not None):
            yield

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Sequence[int]], past: PromptCache | None = None
    ) -> PromptCache:
        """Run prompts, or what is new of them, and return their cache.

        Args:
            prompts: token ids of each prompt; with `past`, only the tokens after what it holds
                (partial prefill). An empty prompt is allowed and leaves nothing.
            past: cache of the same prompts' beginnings; left unchanged.
        """
        past_lengths = past.lengths if past is not None else (0,) * len(prompts)
        past_starts = past.starts if past is not None else (0,) * len(prompts)
        segments = [
            Segment(len(ids), start, length)
            for ids, start, length in zip(prompts, past_starts, past_lengths, strict=True)
        ]
        running = [s for s in segments if s.query_length]
        row = torch.tensor([[i for ids in prompts for i in ids]], device=self.device)
        positions = torch.tensor([positions_of(running)], device=self.device)
        lengths = tuple(len(ids) for ids in prompts)
        new = self.prefill_row(row, positions, lengths, group_segments(running), past)
        return new if past is None else past.extended(new)

    def prefill_packed(self, batch: dict[str, Any]) -> PromptCache:
        """Run the prompts of a batch that `packing.pack` made."""
        layout = batch["layout"]
        ids, position_ids = batch["prefill_ids"], batch["prefill_position_ids"]
        if not layout.prefill.is_plain:
            return self._prefill_by_plan(ids, position_ids, layout.prompt_lengths, layout.prefill)
        return self.prefill_row(ids, position_ids, layout.prompt_lengths, layout.prefill_groups)

    @torch.no_grad()
    def _prefill_by_plan(
        self, ids: Tensor, position_ids: Tensor, lengths: tuple[int, ...], plan: PrefillPlan
    ) -> PromptCache:
        """Run a row in several passes, or parts of it for several prompts."""
        assert self._root is None, "a sharded base runs each row in one pass"
        check_positions(self.config, max(lengths) - 1)
        cache = PromptCache(lengths, device=self.keep_on)
        last = self.config.num_hidden_layers - 1 if self.stop_early else None
        for one in plan.passes:
            index = torch.tensor(one.index(), device=ids.device)
            past = cache if cache.keys else None
            job = AttentionJob(one.groups, past, PassRecorder(cache, one), last)
            self._run(ids[:, index], position_ids[:, index], job)
        return cache

    @torch.no_grad()
    def prefill_row(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: tuple[int, ...],
        groups: tuple[SegmentGroup, ...],
        past: PromptCache | None = None,
    ) -> PromptCache:
        """Run one packed row, already laid out, and return the K/V that it recorded.

        Args:
            input_ids, position_ids: (1, T) int64.
            lengths: tokens of each prompt in the row; zeros are prompts with nothing to run.
            groups: the row's segments.
        """
        if not input_ids.shape[1]:
            if self._root is not None:
                one = torch.zeros((1, 1), dtype=torch.long, device=input_ids.device)
                self._run(one, one, AttentionJob(group_segments([Segment(1)])))
            return empty_cache(lengths, self.causal_lm)
        check_positions(self.config, max(g.past_length + g.query_length for g in groups) - 1)
        record = PromptCache(lengths, device=self.keep_on)
        last = self.config.num_hidden_layers - 1 if self.stop_early else None
        self._run(input_ids, position_ids, AttentionJob(groups, past, record, last))
        return record

    def _run(self, input_ids: Tensor, position_ids: Tensor, job: AttentionJob) -> None:
        with self.base_weights(), contextlib.suppress(LastLayerReached):
            if self._root is None:
                run_backbone(self.causal_lm, input_ids, position_ids, job)
            else:
                inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
                self._root(**inputs, record_only=True, **{JOB_KEYWORD: job})


def empty_cache(lengths: tuple[int, ...], model: PreTrainedModel) -> PromptCache:
    """A cache of no tokens, for batches in which the decoder runs everything."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    shape = (config.num_key_value_heads, 0, head_dim)
    blank = [
        torch.empty(shape, dtype=model.dtype, device=model.device)
        for _ in range(config.num_hidden_layers)
    ]
    return PromptCache(lengths, blank, list(blank))
