"""One base for several decoders that train together: each distinct prompt is run once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.core.packing import pack_prompts
from prefillshare_train.core.prompt_cache import PromptCache

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    cache: PromptCache
    index: int


class SharedPrefill(PrefillModule):
    """A base that remembers the prompts of the current round.

    A round is one micro-batch of every decoder. A batch whose prompts another decoder has brought
    in the same order reads the very same cache; of any other batch, what is new is run.

    Args:
        model: the frozen base, a model of its own.

    Attributes:
        asked: prompt tokens that decoders asked for so far.
        ran: prompt tokens that were run for them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked = self.ran = 0
        self._held: dict[Ids, _Place] = {}

    def new_round(self) -> None:
        """Forget every prompt, and free its K/V once no decoder reads them."""
        self._held.clear()

    def prefill_packed(self, batch: dict[str, Any]) -> PromptCache:
        """As `PrefillModule.prefill_packed`; the cache may be shared and must not be changed."""
        layout = batch["layout"]
        prompts = _split(batch["prefill_ids"][0].tolist(), layout.prompt_lengths)
        self.asked += sum(layout.prompt_lengths)
        places = [self._find(prompt) for prompt in prompts]
        if all(place is None for place, ids in zip(places, prompts, strict=True) if ids):
            cache = super().prefill_packed(batch)
            self.ran += layout.prefill.tokens
            self._hold(prompts, cache)
            return cache
        new = list(dict.fromkeys(p for p, place in zip(prompts, places, strict=True) if not place))
        new = [ids for ids in new if ids]
        if new:
            fresh = pack_prompts(new, device=batch["prefill_ids"].device)
            self.ran += fresh["layout"].prefill.tokens
            self._hold(new, super().prefill_packed(fresh))
            places = [self._find(prompt) for prompt in prompts]
        return _assembled(prompts, places)

    def _hold(self, prompts: Sequence[Ids], cache: PromptCache) -> None:
        for index, ids in enumerate(prompts):
            if ids:
                self._held.setdefault(ids, _Place(cache, index))

    def _find(self, ids: Ids) -> _Place | None:
        """Where a prompt lies, or one that begins with it (another boundary cuts elsewhere)."""
        if not ids:
            return None
        exact = self._held.get(ids)
        if exact is not None:
            return exact
        return next((p for held, p in self._held.items() if held[: len(ids)] == ids), None)


def _split(row: list[int], lengths: Sequence[int]) -> list[Ids]:
    prompts, start = [], 0
    for length in lengths:
        prompts.append(tuple(row[start : start + length]))
        start += length
    return prompts


def _assembled(prompts: Sequence[Ids], places: Sequence[_Place | None]) -> PromptCache:
    """One cache of these prompts: the one that holds them, where it holds just them in order."""
    lengths = tuple(len(ids) for ids in prompts)
    caches = {id(place.cache): place.cache for place in places if place is not None}
    if len(caches) == 1:
        (cache,) = caches.values()
        indices = [place.index for place in places if place is not None]
        if cache.lengths == lengths and indices == list(range(len(lengths))):
            return cache
    spans = []
    for place, length in zip(places, lengths, strict=True):
        if place is not None:
            start = place.cache.starts[place.index]
            spans.append((place.cache, start, start + length))
    layers = range(len(spans[0][0].keys))
    return PromptCache(
        lengths,
        [torch.cat([c.keys[layer][:, a:b] for c, a, b in spans], dim=1) for layer in layers],
        [torch.cat([c.values[layer][:, a:b] for c, a, b in spans], dim=1) for layer in layers],
    )
