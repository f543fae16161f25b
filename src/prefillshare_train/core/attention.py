"""The attention function that records and conditions.

It is registered with transformers under the name `prefillshare` and told what to do by one keyword
argument, which transformers passes through the model to every attention call:

- no job: ordinary attention, with the mask transformers made (so that a model loaded with this
  attention still works with `generate` and any other caller);
- an `AttentionJob`: run a packed row of segments, each continuing its past in a prompt cache
  (*condition*), and optionally keep this layer's K and V (*record*);
- anything else with an `attend` method (decoding steps, see generate.py).

Nothing is mutated except the cache that is being recorded, so gradient checkpointing replays a
decoder's layers exactly.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from prefillshare_train.core.kernels import attend_segments, masked_attention
from prefillshare_train.core.layout import SegmentGroup
from prefillshare_train.core.prompt_cache import PromptCache

ATTENTION_NAME = "prefillshare"
"""`attn_implementation` of every model that this library loads."""

JOB_KEYWORD = "prefillshare_job"
"""Name of the keyword argument that carries the job to each attention call."""


class Recorder(Protocol):
    """What keeps the K/V of a pass: a `PromptCache`, or part of one."""

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's K and V, each of shape (1, H_kv, T, D)."""
        ...


class LastLayerReached(Exception):
    """Raised to end a prefill once the last layer's K/V are recorded: nobody reads what follows."""


class Job(Protocol):
    """What one forward pass asks of every attention call."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attention output of shape (B, T, H, D), from (B, heads, T, D) inputs."""
        ...


class AttentionJob:
    """Run a packed row of segments.

    No dataclass: where FSDP2 casts a layer's inputs it copies those with all that they hold, so
    that every layer would record into a cache of its own and read the past in another dtype.

    Args:
        groups: the row's segments, from `layout.group_segments`.
        past: the prompt cache that segments with a past read; constants, never differentiated.
            It may lie on another device: a layer's K/V are fetched when it runs, and again when
            gradient checkpointing replays it.
        record: receives this row's own K/V, or None.
        last_layer: layer at which to stop with `LastLayerReached` once recorded, or None.
    """

    def __init__(
        self,
        groups: tuple[SegmentGroup, ...],
        past: PromptCache | None = None,
        record: Recorder | None = None,
        last_layer: int | None = None,
    ) -> None:
        self.groups = groups
        self.past = past
        self.record = record
        self.last_layer = last_layer

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self.record is not None:
            self.record.record(layer, key, value)
            if layer == self.last_layer:
                raise LastLayerReached
        past = None
        if self.past is not None and self.past.tokens:
            past = (
                self.past.keys[layer].to(query.device, non_blocking=True),
                self.past.values[layer].to(query.device, non_blocking=True),
            )
        return attend_segments(
            query,
            key,
            value,
            self.groups,
            past,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            sinks=sinks,
        )


def prefillshare_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention entry point, with the signature that transformers calls.

    Args:
        query: (B, H, T, D), post-RoPE.
        key: (B, H_kv, S, D), post-RoPE.
        value: (B, H_kv, S, D).
        attention_mask: boolean (B, 1, T, S) from transformers; not read when a job is given.

    Returns:
        The output, (B, T, H, D), and None in place of the attention weights.

    Raises:
        ValueError: the layer asks for logit soft-capping, which the job kernels do not implement.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError("attention logit soft-capping is not supported by prefillshare attention")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    job: Job | None = kwargs.get(JOB_KEYWORD)
    if job is not None:
        output = job.attend(
            module,
            query,
            key,
            value,
            scaling=scale,
            dropout=dropout,
            sliding_window=sliding_window,
            sinks=s_aux,
        )
        return output, None
    return masked_attention(query, key, value, attention_mask, scale, dropout, s_aux), None


AttentionInterface.register(ATTENTION_NAME, prefillshare_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
