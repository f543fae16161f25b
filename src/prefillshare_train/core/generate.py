"""Generation as it is served: the base prefills, a decoder answers off the cache.

The base's cache is only read; each call makes private K/V for the decoder's own tokens, so several
decoders can answer one prompt off one prefill, in any order.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessorList

from prefillshare_train.core.attention import AttentionJob
from prefillshare_train.core.decode_state import DecodeState
from prefillshare_train.core.layout import Segment, group_segments, positions_of
from prefillshare_train.core.loss import LogitTransform
from prefillshare_train.core.modules import (
    causal_lm_of,
    check_positions,
    evaluating,
    run_backbone,
)
from prefillshare_train.core.prompt_cache import CacheRows, PromptCache

# Prompt tokens of one pass: a large batch's whole prompts at once would take their activations.
_ADMITTED_TOKENS = 16384


def _take(waiting: deque[int], count: int) -> list[int]:
    return [waiting.popleft() for _ in range(min(count, len(waiting)))]


@torch.no_grad()
def generate(
    decoder: nn.Module,
    cache: PromptCache | CacheRows,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    processors: LogitsProcessorList | None = None,
    sampler: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
    should_stop: Callable[[int, Sequence[int]], bool] | None = None,
    on_response: Callable[[int, list[int]], None] | None = None,
    batch_size: int | None = None,
    running: Callable[[list[list[int]]], AbstractContextManager[Any]] | None = None,
) -> list[list[int]]:
    """Answer prompts off a shared prompt cache.

    Args:
        decoder: the decode module, a causal LM or a `PeftModel`.
        cache: the base's K/V of each prompt's first `cache.lengths[i]` tokens; the decoder runs
            the rest, one token at least. It is left as it was. `CacheRows` lets several rows read
            one prompt's K/V.
        prompts: token ids of the whole prompts.
        max_new_tokens: the longest response, the stop token included.
        stop_ids: token ids that end a response; the one that did is kept at its end.
        processors: logits processors or warpers from transformers, given the prompt and what was
            generated so far, left-padded with 0.
        sampler: draw from the distribution with this generator; greedy when None.
        on_token: called with (row, token id) for every token as it is generated.
        should_stop: called with (row, response so far) after every token; True ends the response
            (stop strings, for which text must be decoded).
        on_response: called with (row, response) as each row ends.
        batch_size: rows that decode at once; others wait, and take the place of rows that have
            ended. All of them where None.
        running: entered around every forward pass, the head's too, with the row that each of its
            (B, T) tokens belongs to: for a `decoder` that runs several decoders' rows in one batch.

    Returns:
        The response token ids of each prompt.

    Raises:
        ValueError: a prompt has no token left for the decoder, sizes do not match, or processors
            (which see all rows at one length) are given with a `batch_size` that makes rows wait.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
    if processors and batch_size is not None and batch_size < len(prompts):
        raise ValueError(
            f"processors see all rows at one response length: pass {batch_size} prompts at a time, "
            "or leave batch_size out"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
    if len(prompts) != len(cache.lengths):
        raise ValueError(f"{len(prompts)} prompts, but a cache of {len(cache.lengths)}")
    for row, (ids, held) in enumerate(zip(prompts, cache.lengths, strict=True)):
        if held >= len(ids):
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens and the cache holds {held}; "
                "the decoder must run the last one at least (see core.boundary)"
            )
    with evaluating(decoder):
        return _Loop(
            model=causal_lm_of(decoder),
            cache=cache,
            prompts=[list(ids) for ids in prompts],
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset(stop_ids),
            processors=processors,
            sampler=sampler,
            on_token=on_token,
            should_stop=should_stop,
            on_response=on_response,
            batch_size=batch_size or len(prompts),
            running=running or (lambda rows: contextlib.nullcontext()),
        ).run()


@dataclass
class _Loop:
    """One call of `generate`: pick a token a row, drop finished rows, refill, step, repeat."""

    model: Any
    cache: PromptCache | CacheRows
    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: frozenset[int]
    processors: LogitsProcessorList | None
    sampler: torch.Generator | None
    on_token: Callable[[int, int], None] | None
    should_stop: Callable[[int, Sequence[int]], bool] | None
    on_response: Callable[[int, list[int]], None] | None
    batch_size: int
    running: Callable[[list[list[int]]], AbstractContextManager[Any]]

    def run(self) -> list[list[int]]:
        longest = max(len(ids) for ids in self.prompts)
        check_positions(self.model.config, longest + self.max_new_tokens - 2)
        self.transform = LogitTransform.of(self.model.config)
        self.responses: list[list[int]] = [[] for _ in self.prompts]
        waiting = deque(range(len(self.prompts)))
        active = _take(waiting, self.batch_size)
        nothing = torch.zeros(0, dtype=torch.long, device=self.model.device)
        state = DecodeState(min(self.batch_size, len(self.prompts)), nothing)
        hidden = self._admit(active, state)
        while True:
            tokens = self._pick(hidden, active)
            going = [slot for slot, row in enumerate(active) if self._goes_on(row, tokens[slot])]
            if len(going) < len(active):
                active = [active[slot] for slot in state.keep(going)]
            if not active and not waiting:
                return self.responses
            parts = []
            if active:
                parts.append(self._step(state, active))
            free = self.batch_size - len(active)
            # Admission is a forward pass of its own, so a few places are filled at once.
            if waiting and free >= max(1, self.batch_size // 4):
                new = _take(waiting, free)
                parts.append(self._admit(new, state))
                active = [*active, *new]
            hidden = torch.cat(parts)

    def _goes_on(self, row: int, token: int) -> bool:
        """Keep a token; whether the row needs another."""
        if self._needs_another(row, token):
            return True
        if self.on_response is not None:
            self.on_response(row, self.responses[row])
        return False

    def _needs_another(self, row: int, token: int) -> bool:
        response = self.responses[row]
        response.append(token)
        if self.on_token is not None:
            self.on_token(row, token)
        if token in self.stop_ids or len(response) >= self.max_new_tokens:
            return False
        return self.should_stop is None or not self.should_stop(row, response)

    def _admit(self, rows: list[int], state: DecodeState) -> Tensor:
        """Run the prompts' last tokens on the decoder; hidden state (B, D) at each one's last."""
        passes: list[list[int]] = []
        total = 0
        for row in rows:
            length = len(self.prompts[row]) - self.cache.lengths[row]
            if not passes or total + length > _ADMITTED_TOKENS:
                passes.append([])
                total = 0
            passes[-1].append(row)
            total += length
        return torch.cat([self._admit_at_once(part, state) for part in passes])

    def _admit_at_once(self, rows: list[int], state: DecodeState) -> Tensor:
        cache = self.cache
        if isinstance(cache, CacheRows) or rows != list(range(len(self.prompts))):
            cache = cache.select(rows)
        tails = [self.prompts[row][self.cache.lengths[row] :] for row in rows]
        segments = [
            Segment(len(tail), start, held)
            for tail, start, held in zip(tails, cache.starts, cache.lengths, strict=True)
        ]
        own = PromptCache(tuple(len(tail) for tail in tails))
        job = AttentionJob(group_segments(segments), past=cache, record=own)
        device = self.model.device
        ids = torch.tensor([[i for tail in tails for i in tail]], device=device)
        positions = torch.tensor([positions_of(segments)], device=device)
        owners = [[row for row, tail in zip(rows, tails, strict=True) for _ in tail]]
        with self.running(owners):
            hidden = run_backbone(self.model, ids, positions, job)[0]
        ends = torch.tensor(own.lengths, device=device).cumsum(0) - 1
        state.add(cache, own, self.max_new_tokens)
        return hidden[ends]

    def _step(self, state: DecodeState, active: list[int]) -> Tensor:
        """Run the last token of each active row; hidden states (B, D)."""
        tokens = [self.responses[row][-1] for row in active]
        ids = torch.tensor(tokens, device=state.lengths.device)[:, None]
        with self.running([[row] for row in active]):
            hidden = run_backbone(self.model, ids, state.lengths[:, None], state)
        state.advance()
        return hidden[:, 0]

    def _pick(self, hidden: Tensor, active: list[int]) -> list[int]:
        """Next token of each active row, from hidden states (B, D)."""
        with self.running([[row] for row in active]):
            logits = self.model.get_output_embeddings()(hidden[:, None])[:, 0]
        logits = self.transform(logits).float()
        if self.processors is not None:
            history: Any = self._history(active, hidden.device)
            logits = self.processors(history, logits)
        if self.sampler is None:
            picked: list[int] = logits.argmax(-1).tolist()
            return picked
        weights = F.softmax(logits, dim=-1)
        drawn: list[int] = torch.multinomial(weights, 1, generator=self.sampler)[:, 0].tolist()
        return drawn

    def _history(self, active: list[int], device: torch.device) -> Tensor:
        """(B, width) ids seen by each row, left-padded with 0.

        As wide as the longest prompt asks, even once its row has ended: processors that count from
        the prompt's end (`MinNewTokensLength`) take the width for a length.
        """
        rows = [self.prompts[row] + self.responses[row] for row in active]
        width = max(map(len, self.prompts)) + len(self.responses[active[0]])
        return torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
