"""Random conversations, and the plain reference that their training step must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tests.core.families import VOCAB, WINDOW
from tests.devices import DEVICE
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefillshare_train.core.attention import JOB_KEYWORD, AttentionJob
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import PrefillModule, attach_loss_head
from prefillshare_train.core.packing import BatchLayout, pack, placed
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.core.spans import Conversation, Turn

HEADER = 2

RULES = (
    "last_token",
    "generation_prompt",
    "block_aligned:4",
    "ratio:0",
    "ratio:0.5",
    "ratio:1",
)

SINGLE_TURN = (
    *((WINDOW - 1, 5), (WINDOW, 1), (WINDOW + 1, 6), (3 * WINDOW, 4)),
    *((3 * WINDOW, 4), (2, WINDOW + 3), (3 * WINDOW, 7)),
)
"""(prompt, response) lengths: around the window, equal shapes, and a response past the window."""

MULTI_TURN = (
    ((WINDOW - 1, 5), (4, 3), (WINDOW + 1, 6)),
    ((2, 1), (WINDOW, 9), (3, 3)),
    ((3 * WINDOW, 2), (3, 8), (9, 4)),
)
"""Three turns each: (new prompt tokens, response tokens)."""


def single_turns(
    lengths: Sequence[tuple[int, int]] = SINGLE_TURN, seed: int = 3
) -> list[Conversation]:
    """One-turn conversations of the given (prompt, response) lengths."""
    return [conversation([pair], seed + i) for i, pair in enumerate(lengths)]


def multi_turns(seed: int = 4) -> list[Conversation]:
    """Three-turn conversations, and a one-turn one beside them."""
    shapes = [*MULTI_TURN, ((WINDOW + 1, 5),)]
    return [conversation(turns, seed + i) for i, turns in enumerate(shapes)]


def conversation(turns: Sequence[tuple[int, int]], seed: int, trailing: int = 2) -> Conversation:
    """Random tokens; each turn is (new prompt tokens, response tokens). Some tokens trail."""
    generator = torch.Generator().manual_seed(seed)
    spans, length = [], 0
    for prompt, response in turns:
        start = length + prompt
        spans.append(Turn(start, start + response, min(HEADER, prompt)))
        length = start + response
    ids = torch.randint(0, VOCAB, (length + trailing,), generator=generator)
    return Conversation(tuple(ids.tolist()), tuple(spans))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every gradient, by parameter name; zeros where nothing arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def prefill_batch(base: PrefillModule, batch: dict[str, Any]) -> PromptCache:
    """The base's pass over a packed batch."""
    layout: BatchLayout = batch["layout"]
    positions = [i for n in layout.prompt_lengths for i in range(n)]
    return base.prefill_row(
        batch["prefill_ids"],
        torch.tensor([positions], device=DEVICE),
        layout.prompt_lengths,
        layout.prefill_groups,
    )


def packed_logits(decoder: nn.Module, batch: dict[str, Any], cache: PromptCache) -> Tensor:
    """(N, vocabulary) logits at the targets, from transformers' own head."""
    job = AttentionJob(batch["layout"].decode_groups, past=cache)
    output = decoder(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=DEVICE),
        use_cache=False,
        **{JOB_KEYWORD: job},
    )
    return output.logits[0, batch["target_index"][0]]


def packed_loss(decoder: nn.Module, batch: dict[str, Any], cache: PromptCache) -> Tensor:
    """The summed loss of a packed batch, through the loss head."""
    attach_loss_head(decoder)
    output = decoder(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        target_index=batch["target_index"],
        **{JOB_KEYWORD: AttentionJob(batch["layout"].decode_groups, past=cache)},
    )
    nll: Tensor = output["nll"]
    return nll


def packed_step(
    base: PrefillModule,
    decoder: nn.Module,
    conversations: Sequence[Conversation],
    rule: BoundaryRule,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Loss, logits at targets, gradients and labels of one packed training step."""
    batch = placed(pack(conversations, rule), DEVICE)
    cache = prefill_batch(base, batch)
    decoder.zero_grad()
    nll = packed_loss(decoder, batch, cache)
    nll.backward()
    gradients = gradients_of(decoder)
    with torch.no_grad():
        logits = packed_logits(decoder, batch, cache)
    return nll.detach(), logits, gradients, batch["labels"][0]


def reference_step(
    base: PreTrainedModel,
    decoder: nn.Module,
    conversations: Sequence[Conversation],
    rule: BoundaryRule,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """The same, one turn at a time, with transformers' own attention, masks and K/V cache."""
    decoder.zero_grad()
    nll: Tensor = torch.zeros((), dtype=torch.float64, device=DEVICE)
    logits, labels = [], []
    for one in conversations:
        ids = torch.tensor([one.token_ids], device=DEVICE)
        for turn in one.turns:
            start = rule.base_length(turn.prompt_length, turn.header_length)
            cache = None
            if start:
                with torch.no_grad():
                    cache = base(ids[:, :start], use_cache=True).cache
            output = decoder(ids[:, start : turn.end - 1], cache=cache, use_cache=True)
            turn_logits = output.logits[0, turn.prompt_length - 1 - start :]
            target = ids[0, turn.prompt_length : turn.end]
            loss = F.cross_entropy(turn_logits.double(), target, reduction="sum")
            loss.backward()
            nll = nll + loss.detach()
            logits.append(turn_logits.detach())
            labels.append(target)
    return nll, torch.cat(logits), gradients_of(decoder), torch.cat(labels)


def packed_order(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Conversations in the order in which `pack` lays them out, read off its labels."""
    labels = pack(conversations, BoundaryRule.parse("last_token"))["labels"][0].tolist()
    remaining, ordered = list(conversations), []
    while remaining:
        for one in remaining:
            targets = [i for t in one.turns for i in one.token_ids[t.prompt_length : t.end]]
            if labels[: len(targets)] == targets:
                break
        else:
            raise AssertionError("pack's labels are not those of its conversations")
        remaining.remove(one)
        ordered.append(one)
        labels = labels[len(targets) :]
    return ordered
