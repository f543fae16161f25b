"""Exact match of generated answers, through the same code that serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.generate import generate
from prefillshare_train.core.modules import PrefillModule, causal_lm_of, empty_cache
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.data import EvalExample, Renderer, is_correct

_BATCHES_A_PREFILL = 4


@dataclass(frozen=True)
class Answer:
    """One generated answer and its verdict."""

    text: str
    reference: str
    correct: bool


def answer_examples(
    decoder: nn.Module,
    examples: Sequence[EvalExample],
    renderer: Renderer,
    *,
    prefill: PrefillModule | None,
    rule: BoundaryRule,
    max_new_tokens: int,
    batch_size: int = 8,
    description: str = "answering",
) -> list[Answer]:
    """Greedy answers to evaluation turns, compared with their references.

    Args:
        prefill: the base, which runs each prompt up to the boundary; None has the decoder run the
            whole prompt itself.

    Returns:
        One answer an example, in order.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    answers: dict[int, Answer] = {}
    # A few batches' prompts are prefilled at once, so that ended answers make room for others.
    lump = _BATCHES_A_PREFILL * batch_size
    groups = [order[i : i + lump] for i in range(0, len(order), lump)]
    with tqdm(total=len(examples), desc=description, unit="answer", leave=False) as bar:

        def tick(row: int, response: Sequence[int]) -> None:
            bar.update()

        for group in groups:
            chosen = [examples[i] for i in group]
            prompts = [e.prompt_ids for e in chosen]
            cache = shared_cache(prefill, decoder, chosen, rule)
            responses = generate(
                decoder,
                cache,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_ids=renderer.end_token_ids,
                on_response=tick,
                batch_size=batch_size,
            )
            for index, example, ids in zip(group, chosen, responses, strict=True):
                text = renderer.decode(ids, skip_special_tokens=True)
                verdict = is_correct(text, example.message, example.row.scoring)
                answers[index] = Answer(text, example.reference, verdict)
    return [answers[i] for i in range(len(examples))]


def shared_cache(
    prefill: PrefillModule | None,
    decoder: nn.Module,
    examples: Sequence[EvalExample],
    rule: BoundaryRule,
) -> PromptCache:
    """The base's cache of each prompt up to its boundary; of no tokens without a base."""
    if prefill is None:
        return empty_cache((0,) * len(examples), causal_lm_of(decoder))
    cut = [rule.base_length(len(e.prompt_ids), e.header_length) for e in examples]
    return prefill.prefill([e.prompt_ids[:n] for e, n in zip(examples, cut, strict=True)])


class ExactMatchCallback(TrainerCallback):
    """Logs `eval_exact_match` every `generate_every` steps."""

    def __init__(self, trainer: Any, examples: Sequence[EvalExample], renderer: Renderer) -> None:
        self._trainer = trainer
        self._examples = list(examples)[: trainer.args.generate_rows]
        self._renderer = renderer

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        every: int = self._trainer.args.generate_every
        if not every or state.global_step % every or not self._examples:
            return
        # Generating must not move the generators that dropout and shuffling draw from.
        with torch.random.fork_rng():
            answers = answer_examples(
                self._trainer.model,
                self._examples,
                self._renderer,
                prefill=self._trainer.prefill,
                rule=self._trainer.rule,
                max_new_tokens=self._trainer.args.generate_max_new_tokens,
            )
        share = sum(answer.correct for answer in answers) / len(answers)
        # log() says that nothing is left to log, and the step's own loss is.
        wanted = control.should_log
        self._trainer.log({"eval_exact_match": share})
        control.should_log = wanted
