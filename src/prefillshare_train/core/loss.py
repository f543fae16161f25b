"""Next-token loss with the LM head run on target positions only, a chunk at a time.

The full (tokens, vocabulary) logits never exist: for each chunk the head runs, the loss and its
gradients are taken at once, and the logits are thrown away. The gradients are those of ordinary
cross-entropy. (The scheme is Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989 §3.2, in
plain PyTorch; on CUDA the package itself is used where it is installed and its chunks are no
smaller than ours. It makes them so small that the logits take no more room than the hidden states:
with few targets and a large vocabulary that is a handful of rows for every pass over the head: 512
targets of Qwen3-1.7B go in 64 chunks of 8.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
"""Target positions in a chunk; bounds the logits that exist at once to 256 x vocabulary."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a family does to the head's output: `logits = softcap(raw * scale)`.

    Attributes:
        scale: factor on the raw logits (1 / `logits_scaling` for Granite).
        softcap: c in `c * tanh(x / c)`, or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read the transform that a model's configuration asks for."""
        return cls(
            scale=1.0 / getattr(config, "logits_scaling", 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, raw: Tensor) -> Tensor:
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def gradient(self, raw: Tensor, upstream: Tensor) -> Tensor:
        """d loss / d raw, from d loss / d logits."""
        if self.softcap is not None:
            inner = torch.tanh(raw * (self.scale / self.softcap))
            upstream = upstream * (1 - inner * inner)
        return upstream if self.scale == 1.0 else upstream * self.scale


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over target positions, so that any batch split adds up to the same mean.

    Attributes:
        nll: summed negative log-likelihood in nats, a scalar (float32, or float64 in float64).
        correct: how many targets the arg-max hit, a scalar int64; None unless asked for.
    """

    nll: Tensor
    correct: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    transform: LogitTransform | None = None,
    *,
    count_correct: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> LossSums:
    """Summed cross-entropy of an LM head over target positions.

    Args:
        hidden: (N, D), last hidden states at the positions that predict the targets.
        head: the LM head; a plain `nn.Linear` takes the fused route, anything else (an adapter on
            the head, a wrapped module) is run chunk by chunk under activation checkpointing.
        labels: (N,) int64 target ids.
        transform: what the family does to the raw logits.
        count_correct: also count arg-max hits (one more pass over the logits).
    """
    transform = transform or LogitTransform()
    plain = type(head) is nn.Linear and head.bias is None
    if plain and hidden.is_cuda and not count_correct:
        fused = _liger_loss(hidden, head.weight, labels, transform, chunk_tokens)  # type: ignore[arg-type]
        if fused is not None:
            return LossSums(fused)
    if plain:
        weight: Any = head.weight
        if not torch.is_grad_enabled():  # the function would compute gradients for nobody
            hidden, weight = hidden.detach(), weight.detach()
        nll, correct = _FusedLinearCrossEntropy.apply(
            hidden, weight, labels, transform, count_correct, chunk_tokens
        )
        return LossSums(nll, correct if count_correct else None)

    def chunk_loss(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = _wide(transform(head(h)))
        hits = (logits.detach().argmax(-1) == y).sum() if count_correct else y.new_zeros(())
        return F.cross_entropy(logits, y, reduction="sum"), hits

    parts = [
        checkpoint(chunk_loss, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]
    nll = torch.stack([part[0] for part in parts]).sum()
    hits = torch.stack([part[1] for part in parts]).sum()
    return LossSums(nll, hits if count_correct else None)


def _wide(logits: Tensor) -> Tensor:
    """At least float32, since a sum over the vocabulary in bfloat16 loses the loss."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in the forward pass, one chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        count_correct: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        nll = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        correct = labels.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_tokens):
            h, y = hidden[start : start + chunk_tokens], labels[start : start + chunk_tokens]
            raw = F.linear(h, weight)
            logits = _wide(transform(raw))
            if count_correct:
                correct += (logits.argmax(-1) == y).sum()
            log_norm = torch.logsumexp(logits, dim=-1)
            nll += (log_norm - logits.gather(-1, y[:, None])[:, 0]).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope = torch.exp_(logits.sub_(log_norm[:, None]))
            slope[torch.arange(y.shape[0], device=y.device), y] -= 1.0
            slope = transform.gradient(raw, slope.to(raw.dtype))
            if grad_hidden is not None:
                grad_hidden[start : start + chunk_tokens] = torch.mm(slope, weight.to(slope.dtype))
            if needs_weight:
                part = torch.mm(slope.t(), h.to(slope.dtype))
                if grad_weight is None:
                    # More than one chunk adds up in float32: bfloat16 sums would drift.
                    single = hidden.shape[0] <= chunk_tokens
                    grad_weight = part if single else _wide(part)
                else:
                    grad_weight += part
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        scale = upstream[0]
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale.to(grad_weight.dtype)),
            *(None,) * 4,
        )


def _liger_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, transform: LogitTransform, chunk_tokens: int
) -> Tensor | None:
    """Liger's fused kernel, where it is installed, knows the transform and pays.

    It sums in float32, which float64 would lose by.
    """
    vocabulary, width = weight.shape
    its_chunk = hidden.shape[0] * width // vocabulary
    if transform.scale != 1.0 or hidden.dtype == torch.float64 or its_chunk < chunk_tokens:
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=transform.softcap)
    return loss(weight, hidden, labels)
