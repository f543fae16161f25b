"""From a data configuration to the conversations that are trained and evaluated."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from prefillshare_train.core.spans import Conversation
from prefillshare_train.data.config import DataConfig, SourceConfig
from prefillshare_train.data.errors import DataError
from prefillshare_train.data.rendering import Renderer, make_renderer
from prefillshare_train.data.report import DataReport, SourceReport, SplitReport
from prefillshare_train.data.rows import Message, Row
from prefillshare_train.data.sources import LoadedRows, load_rows
from prefillshare_train.data.tokenize import Drop, RowTokenizer, TokenizedRow

_PROGRESS_FROM = 2000


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One evaluated turn, for metrics that generate.

    Attributes:
        row: the row it belongs to; `row.scoring` says how answers are compared.
        message: the assistant message that a right answer equals.
        prompt_ids: the prompt, exactly as it was trained.
        header_length: tokens of the generation prompt at the prompt's end.
        reference: the response's text, as the template writes it, without special tokens.
    """

    row: Row
    message: Message
    prompt_ids: tuple[int, ...]
    header_length: int
    reference: str


@dataclass(frozen=True)
class PreparedData:
    """What training and evaluation run on.

    Attributes:
        train: in training order before any epoch's own shuffling.
        eval: in source order; empty where nothing is evaluated.
        eval_rows: the rows behind `eval`, in order; one may have several conversations.
        eval_examples: one a turn of `eval`, in order.
        renderer: what made the prompts; its `fingerprint()` belongs into the contract.
        report: what became of the rows.
    """

    train: list[Conversation]
    eval: list[Conversation]
    eval_rows: list[Row]
    eval_examples: list[EvalExample]
    renderer: Renderer
    report: DataReport


def build_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: Path = Path("."),
    end_token_ids: Sequence[int] = (),
) -> PreparedData:
    """Read, check, render, tokenize, deduplicate and split.

    Args:
        base_dir: the recipe's directory; relative paths are looked up from the current directory
            first, then from here.
        end_token_ids: EOS ids of the model's generation config, where it has others than the
            tokenizer.

    Raises:
        DataError: the configuration does not fit the data or the tokenizer, rows are bad, or no row
            is left to train on. Rows are checked before any is tokenized.
    """
    renderer = renderer_of(config, tokenizer, base_dir=base_dir, end_token_ids=end_token_ids)
    loaded = [
        (source, load_rows(source, base_dir=base_dir, seed=config.seed))
        for source in (config.train, config.eval)
        if source is not None
    ]
    if config.eval is not None and config.eval_max_rows is not None:
        source, rows = loaded[1]
        loaded[1] = source, _sampled(rows, config.eval_max_rows, config.seed)
    done = [_tokenize(source, rows, renderer, config) for source, rows in loaded]
    reports = [report for _, report in done]
    train = done[0][0]
    overlap = 0
    if config.eval is not None:
        held_out = done[1][0]
        if config.dedupe:
            evaluated = {item.conversations for item in held_out}
            kept = [item for item in train if item.conversations not in evaluated]
            overlap, train = len(train) - len(kept), kept
    else:
        train, held_out = split_rows(train, config.eval_fraction, config.eval_max_rows, config.seed)
    if not train:
        raise DataError(
            f"no row of {config.train.source} is left to train on: all {overlap} are also evaluated"
        )
    conversations = [conversation for item in train for conversation in item.conversations]
    random.Random(config.shuffle_seed).shuffle(conversations)
    evaluation = [conversation for item in held_out for conversation in item.conversations]
    return PreparedData(
        train=conversations,
        eval=evaluation,
        eval_rows=[item.row for item in held_out],
        eval_examples=[example for item in held_out for example in eval_examples(item, renderer)],
        renderer=renderer,
        report=DataReport(
            reports,
            SplitReport.of(conversations),
            SplitReport.of(evaluation) if evaluation else None,
            overlap,
        ),
    )


def renderer_of(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: Path = Path("."),
    end_token_ids: Sequence[int] = (),
) -> Renderer:
    """The renderer that a configuration asks for (see `make_renderer`)."""
    return make_renderer(
        tokenizer,
        chat_template=config.chat_template,
        prompt_template=config.prompt_template,
        system_prompt=config.system_prompt,
        template_kwargs=config.chat_template_kwargs,
        end_token_ids=end_token_ids,
        base_dir=base_dir,
    )


def split_rows(
    rows: list[TokenizedRow], fraction: float, max_rows: int | None, seed: int
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Training and evaluation rows; rows with equal first prompts stay together.

    Returns:
        Both in source order. Training keeps one row at least. Where every group of equal prompts is
        larger than the share, the smallest is evaluated where `max_rows` allows.
    """
    wanted = min(max(1, round(len(rows) * fraction)), len(rows) - 1) if fraction else 0
    if max_rows is not None:
        wanted = min(wanted, max_rows)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(rows):
        first = item.conversations[0]
        groups.setdefault(first.token_ids[: first.turns[0].prompt_length], []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if wanted and not chosen and len(order) > 1:
        smallest = min(order, key=lambda group: len(group))
        if max_rows is None or len(smallest) <= max_rows:
            chosen.update(smallest)
    train = [item for index, item in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def eval_examples(item: TokenizedRow, renderer: Renderer) -> list[EvalExample]:
    """One example for every turn of a row, in order."""
    spans = [
        (conversation.token_ids, turn)
        for conversation in item.conversations
        for turn in conversation.turns
    ]
    return [
        EvalExample(
            row=item.row,
            message=message,
            prompt_ids=ids[: turn.prompt_length],
            header_length=turn.header_length,
            reference=renderer.decode(ids[turn.prompt_length : turn.end], skip_special_tokens=True),
        )
        for (ids, turn), message in zip(spans, item.targets, strict=True)
    ]


def _sampled(loaded: LoadedRows, size: int, seed: int) -> LoadedRows:
    rows = loaded.rows
    if size < len(rows):
        rows = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), size))]
    return dataclasses.replace(loaded, rows=rows)


def _tokenize(
    source: SourceConfig, loaded: LoadedRows, renderer: Renderer, config: DataConfig
) -> tuple[list[TokenizedRow], SourceReport]:
    report = SourceReport.of(source.source, loaded)
    tokenizer = RowTokenizer(renderer, max_length=config.max_length, train_on=config.train_on)
    rows: list[TokenizedRow] = []
    seen: set[tuple[Conversation, ...]] = set()
    progress = tqdm(
        tokenizer.tokenize(loaded.rows),
        total=len(loaded.rows),
        desc=f"tokenizing {Path(source.source).name}",
        unit="row",
        disable=len(loaded.rows) <= _PROGRESS_FROM,
    )
    for result in progress:
        if config.overlong == "error":
            _refuse_overlong(result, config.max_length)
        if not isinstance(result, Drop):
            if config.dedupe and result.conversations in seen:
                report.duplicates += 1
                continue
            seen.add(result.conversations)
            rows.append(result)
        report.add(result)
    report.require_rows()
    return rows, report


def _refuse_overlong(result: TokenizedRow | Drop, max_length: int) -> None:
    overlong = result.reason == "overlong" if isinstance(result, Drop) else result.dropped_turns
    if overlong:
        detail = result.detail if isinstance(result, Drop) else f"{overlong} of its turns end later"
        raise DataError(
            f"{result.row.origin}: longer than max_length {max_length}: {detail}. Raise "
            "data.max_length, or set data.overlong: drop"
        )
