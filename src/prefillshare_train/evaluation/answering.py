"""Answers of several decoders to the same prompts, each prompt prefilled by the base once."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prefillshare_train.core.generate import generate
from prefillshare_train.data import Renderer
from prefillshare_train.evaluation.contestants import Contestants
from prefillshare_train.evaluation.prompts import Prompt
from prefillshare_train.evaluation.variants import Variant

# Tokens decoded to look for a stop string: older ones were looked at when they came.
_STOP_WINDOW = 24


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer.

    Attributes:
        output: text up to the first stop string, special tokens left out.
        tokens: response tokens generated, the stop token included.
        base_tokens: prompt tokens that the base ran for this variant.
        seconds: wall time of generation since the answer before; only their sum over all variants
            says something, as several answers are made at once.
        prefill_seconds: its share of the group's prefill, which all variants of a prompt share.
        prefill_id: of that prefill; answers of two sittings do not share one.
    """

    variant: Variant
    prompt: Prompt
    output: str
    tokens: int
    base_tokens: int
    seconds: float
    prefill_seconds: float
    prefill_id: str


def answer(
    contestants: Contestants,
    wanted: Sequence[tuple[Prompt, Sequence[Variant]]],
    keep: Callable[[Answered], None],
    *,
    batch_size: int,
    prefill_tokens: int,
) -> None:
    """Greedy answers, a group of prompts of similar length at a time.

    Decoders that are adapters of one model answer in one batch, as they are served.

    Args:
        wanted: prompts, each with the variants that still have to answer it.
        keep: given each answer as it ends, so that a run that is killed has it.
        batch_size: answers of each decoder that decode at once.
        prefill_tokens: prompt tokens of a group, so that its K/V fit into memory.
    """
    ordered = sorted(wanted, key=lambda pair: len(pair[0].ids))
    for group in _groups(ordered, prefill_tokens, batch_size):
        _answer_group(contestants, group, keep, batch_size)


def _groups(
    ordered: Sequence[tuple[Prompt, Sequence[Variant]]], tokens: int, batch_size: int
) -> Iterator[list[tuple[Prompt, Sequence[Variant]]]]:
    """Prompts in order; a group is cut where it is full, but not below one batch."""
    group: list[tuple[Prompt, Sequence[Variant]]] = []
    total = 0
    for pair in ordered:
        length = len(pair[0].ids)
        if group and total + length > tokens and len(group) >= batch_size:
            yield group
            group, total = [], 0
        group.append(pair)
        total += length
    if group:
        yield group


def _answer_group(
    contestants: Contestants,
    group: Sequence[tuple[Prompt, Sequence[Variant]]],
    keep: Callable[[Answered], None],
    batch_size: int,
) -> None:
    prompts = [prompt for prompt, _ in group]
    cuts = [
        {v: v.base_length(len(p.ids), p.header_length) for v in variants} for p, variants in group
    ]
    start = time.perf_counter()
    cache = contestants.prefill.prefill(
        [p.ids[: max(cut.values())] for p, cut in zip(prompts, cuts, strict=True)]
    )
    prefill_seconds = (time.perf_counter() - start) / len(group)
    prefill_id = uuid.uuid4().hex
    for together in _batches(contestants, dict.fromkeys(v for _, found in group for v in found)):
        rows = [(i, v) for i, (_, found) in enumerate(group) for v in together if v in found]
        lengths = [cuts[i][variant] for i, variant in rows]
        chosen = [prompts[i] for i, _ in rows]
        variants = [variant for _, variant in rows]
        about_prefill = prefill_seconds, prefill_id
        start = time.perf_counter()
        decoder, running = contestants.model_for([variant.decoder for variant in variants])
        generate(
            decoder,
            cache.rows([i for i, _ in rows], lengths),
            [p.ids for p in chosen],
            max_new_tokens=max(p.item.max_new_tokens for p in chosen),
            stop_ids=contestants.renderer.end_token_ids,
            should_stop=Stopper(contestants.renderer, chosen),
            on_response=_Keeper(
                contestants.renderer, variants, chosen, lengths, about_prefill, start, keep
            ),
            batch_size=batch_size * len(together),
            running=running,
        )


def _batches(contestants: Contestants, variants: Iterable[Variant]) -> list[list[Variant]]:
    """Variants whose answers decode in one batch: of each decoder one, so that memory is bounded.

    One that runs its whole prompts itself decodes alone: its batch is long enough.
    """
    batches: list[list[Variant]] = []
    for variant in variants:
        lane = contestants.lane_of(variant.decoder)
        for batch in batches:
            shared = variant.rule is not None and batch[0].rule is not None
            decoders = [other.decoder for other in batch]
            if (
                shared
                and variant.decoder not in decoders
                and contestants.lane_of(decoders[0]) == lane
            ):
                batch.append(variant)
                break
        else:
            batches.append([variant])
    return batches


class _Keeper:
    """Passes each response on as it ends; its seconds are those since the one before."""

    def __init__(
        self,
        renderer: Renderer,
        variants: Sequence[Variant],
        prompts: Sequence[Prompt],
        base_tokens: Sequence[int],
        about_prefill: tuple[float, str],
        start: float,
        keep: Callable[[Answered], None],
    ) -> None:
        self._renderer = renderer
        self._variants = variants
        self._prompts = prompts
        self._base_tokens = base_tokens
        self._about_prefill = about_prefill
        self._keep = keep
        self._last = start

    def __call__(self, row: int, ids: list[int]) -> None:
        prompt = self._prompts[row]
        text = self._renderer.decode(ids, skip_special_tokens=True)
        answered = Answered(
            self._variants[row],
            prompt,
            cut_at(text, prompt.item.stop),
            len(ids),
            self._base_tokens[row],
            time.perf_counter() - self._last,
            *self._about_prefill,
        )
        self._keep(answered)
        self._last = time.perf_counter()  # keeping an answer is no part of making the next


class Stopper:
    """Whether a row has reached one of its stop strings, or its own longest answer."""

    def __init__(self, renderer: Renderer, prompts: Sequence[Prompt]) -> None:
        self._renderer = renderer
        self._items = [prompt.item for prompt in prompts]

    def __call__(self, row: int, ids: Sequence[int]) -> bool:
        item = self._items[row]
        if len(ids) >= item.max_new_tokens:
            return True
        if not item.stop:
            return False
        window = max(_STOP_WINDOW, *(len(stop) for stop in item.stop))
        text = self._renderer.decode(ids[-window:], skip_special_tokens=True)
        return any(stop in text for stop in item.stop)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [found for stop in stops if (found := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
