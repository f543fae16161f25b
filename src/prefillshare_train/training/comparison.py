"""One set of held-out turns, several decoders: loss and exact match side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.loading import LoadedDecoder, load_decoder
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.data import EvalExample, PreparedData
from prefillshare_train.training.exact_match import Answer, answer_examples
from prefillshare_train.training.held_out import held_out_loss
from prefillshare_train.training.recipe import LoadedRecipe, RecipeError
from prefillshare_train.training.run import prepare_data


@dataclass(frozen=True)
class Score:
    """How one decoder did.

    Attributes:
        decoder: `base`, `full_prompt`, `naive` or `prefillshare`.
        prefill: who ran the prompt, `base` or `self` (the decoder).
        held_out_loss: mean negative log-likelihood of the target tokens, nats.
        exact_match: share of `n` greedy answers that are right.
        answers: the answers themselves.
    """

    decoder: str
    prefill: str
    held_out_loss: float
    exact_match: float
    n: int
    answers: list[Answer]

    def row(self) -> dict[str, str | float | int]:
        """The figures, without the answers."""
        return {key: value for key, value in asdict(self).items() if key != "answers"}


@dataclass(frozen=True)
class HeldOut:
    """What decoders are measured on, and how.

    Attributes:
        data: prepared data; all of `data.eval` gives the loss.
        examples: the turns that are answered.
        max_new_tokens: the longest answer.
        batch_size: turns answered, and conversations scored, at once.
    """

    data: PreparedData
    examples: Sequence[EvalExample]
    max_new_tokens: int
    batch_size: int = 8

    def score(
        self, name: str, decoder: nn.Module, prefill: PrefillModule | None, rule: BoundaryRule
    ) -> Score:
        """Measure one decoder; without a prefill module it runs whole prompts itself."""
        answers = answer_examples(
            decoder,
            self.examples,
            self.data.renderer,
            prefill=prefill,
            rule=rule,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            description=f"{name} answers",
        )
        loss = held_out_loss(
            decoder,
            self.data.eval,
            prefill=prefill,
            rule=rule,
            batch_size=self.batch_size,
            description=f"{name} loss",
        )
        right = sum(answer.correct for answer in answers)
        return Score(
            name,
            "self" if prefill is None else "base",
            loss,
            right / len(answers),
            len(answers),
            answers,
        )


def compare_methods(
    held_out: HeldOut,
    conditioned: Path,
    full_prompt: Path | None,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Score]:
    """Base, ordinary fine-tuning, naive sharing and PrefillShare on the same turns.

    Naive sharing is the `full_prompt` decoder made to read the base's cache, at the boundary of the
    conditioned one.

    Args:
        conditioned: folder of a decoder trained with `method: prefillshare`.
        full_prompt: folder of one trained with `method: full_prompt` on the same data.
        base, dtype: as in `load_decoder`.

    Raises:
        ContractError: a decoder was trained with another method, over another base, or for prompts
            of another form than the held-out ones.
    """
    prompt = held_out.data.renderer.prompt_contract()
    ours = _load(conditioned, "prefillshare", base, dtype)
    ours.contract.verify(prompt=prompt)
    rule = ours.contract.rule
    with ours.prefill.base_weights():
        scores = [held_out.score("base", ours.prefill.model, None, rule)]
    scores.append(held_out.score("prefillshare", ours.decoder, ours.prefill, rule))
    if full_prompt is None:
        return scores
    theirs = _load(full_prompt, "full_prompt", base, dtype)
    theirs.contract.verify(prompt=prompt, base_fingerprint=ours.contract.base_fingerprint)
    return [
        scores[0],
        held_out.score("full_prompt", theirs.decoder, None, rule),
        held_out.score("naive", theirs.decoder, theirs.prefill, rule),
        scores[1],
    ]


def _load(folder: Path, method: str, base: str | None, dtype: torch.dtype | None) -> LoadedDecoder:
    loaded = load_decoder(folder, base=base, dtype=dtype)
    if loaded.contract.method != method:
        raise ContractError(
            f"{folder} was trained with method {loaded.contract.method}; a decoder of method "
            f"{method} is needed here"
        )
    return loaded


def write_answers(scores: Sequence[Score], path: Path) -> None:
    """One JSON line an answer: complete or not at all."""
    beside = path.with_name(f".unfinished-{path.name}")
    with beside.open("w") as file:
        for score in scores:
            for answer in score.answers:
                line = {"decoder": score.decoder, "prefill": score.prefill, **asdict(answer)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    beside.replace(path)


def score_table(scores: Sequence[Score], title: str) -> Table:
    """The figures for a reader."""
    table = Table(title=title)
    for column in ("", "held-out loss", "exact match", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for score in scores:
        table.add_row(
            score.decoder,
            f"{score.held_out_loss:.3f}",
            f"{score.exact_match:.1%}",
            str(score.n),
        )
    return table


def held_out_report(
    loaded: LoadedRecipe,
    conditioned: Path,
    full_prompt: Path | None,
    *,
    out: Path | None,
    rows: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> Table:
    """`compare_methods` on a recipe's held-out rows, written to files.

    Base and decoders run in the recipe's `base.dtype`; where that is `auto`, in the K/V dtype that
    `conditioned` was trained with, whatever machine this is.

    Args:
        out: JSON file of the figures; the answers go to a `.jsonl` of the same name.
        rows: answer the first so many turns.

    Raises:
        RecipeError: the recipe has no held-out rows.
        ContractError: see `compare_methods`.
    """
    recipe = loaded.recipe
    data = prepare_data(loaded)
    if not data.eval_examples:
        raise RecipeError("the recipe evaluates nothing: set data.eval or data.eval_fraction")
    held_out = HeldOut(data, data.eval_examples[:rows], max_new_tokens, batch_size)
    auto = recipe.base.dtype_is_auto
    dtype = Contract.load(conditioned).kv_dtype if auto else recipe.base.dtype
    scores = compare_methods(
        held_out,
        conditioned,
        full_prompt,
        base=recipe.base_location,
        dtype=getattr(torch, dtype),
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_answers(scores, out.with_suffix(".jsonl"))
        beside = out.with_name(f".unfinished-{out.name}")
        figures = {"scores": [score.row() for score in scores], "dtype": dtype}
        beside.write_text(json.dumps(figures, indent=2) + "\n")
        beside.replace(out)
    return score_table(scores, "Held-out rows")
