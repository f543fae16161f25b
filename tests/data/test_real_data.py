"""The data sets of the recipes, as their files lie beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.helpers import chat, kept, row, tiny_tokenizer, tokenize
from transformers import PreTrainedTokenizerBase

from prefillshare_train.data import (
    DataConfig,
    PreparedData,
    SourceConfig,
    build_dataset,
    is_correct,
    make_renderer,
)
from prefillshare_train.data.config import FormatName
from prefillshare_train.data.rendering import tokenizer_fingerprint

LONG = 1 << 20


def prepare(
    tokenizer: PreTrainedTokenizerBase, source: SourceConfig, max_length: int = LONG
) -> PreparedData:
    template = "chatml-tools" if source.tools_file else None
    config = DataConfig(
        train=source,
        chat_template=template,
        max_length=max_length,
        eval_fraction=0.2,
        eval_max_rows=None,
        overlong="error",
    )
    return build_dataset(config, tokenizer)


def seal_tools(shared_data: Path, name: str, sample: int | None = None) -> SourceConfig:
    folder = shared_data / "seal_tools"
    return SourceConfig(
        source=str(folder / f"{name}.jsonl"),
        tools_file=str(folder / "tool.jsonl"),
        distractors=9,
        sample=sample,
    )


def check(data: PreparedData, format_name: str, read: int, filtered: int = 0) -> None:
    """Every row is there, none was dropped, and every reference counts as right."""
    (source,) = data.report.sources
    assert (source.format, source.rows_read, source.rows_filtered) == (format_name, read, filtered)
    assert (source.drops, source.notes, source.dropped_turns) == ({}, {}, 0)
    assert source.history_rewritten == 0
    assert len(data.train) + len(data.eval) == source.rows - source.duplicates
    for example in data.eval_examples:
        assert is_correct(example.reference, example.message, example.row.scoring)


@pytest.mark.parametrize(
    ("name", "format_name", "read", "filtered"),
    [
        ("gsm8k/train.jsonl", "gsm8k", 7473, 0),
        ("gsm8k/test.jsonl", "gsm8k", 1319, 0),
        ("mbpp", "mbpp", 397, 91),
        ("react_traces/hotpotqa.json", "react", 500, 0),
    ],
)
def test_rows(
    shared_data: Path, name: str, format_name: FormatName, read: int, filtered: int
) -> None:
    chosen: FormatName = format_name if format_name == "react" else "auto"
    source = SourceConfig(source=str(shared_data / name), format=chosen)
    data = prepare(tiny_tokenizer(), source)
    check(data, format_name, read, filtered)
    assert data.report.sources[0].duplicates == 0


def test_gsm8k_is_without_annotations_and_scored_as_maths(shared_data: Path) -> None:
    source = SourceConfig(source=str(shared_data / "gsm8k" / "test.jsonl"))
    data = prepare(tiny_tokenizer(), source)
    assert data.eval_examples
    for example in data.eval_examples:
        assert "<<" not in example.reference
        assert example.row.scoring == "math"
        assert not is_correct(example.reference + "1", example.message, "math")


def test_react_is_trained_in_one_conversation_of_several_turns(shared_data: Path) -> None:
    source = SourceConfig(source=str(shared_data / "react_traces"), format="react")
    data = prepare(tiny_tokenizer(), source)
    turns = [turn for item in [*data.train, *data.eval] for turn in item.turns]
    assert len(turns) == 1385
    assert all(item.reference.startswith("Thought") for item in data.eval_examples)


@pytest.mark.parametrize(
    ("name", "rows"), [("dev", 700), ("test_in_domain", 700), ("test_out_domain", 654)]
)
def test_seal_tools_rows(shared_data: Path, name: str, rows: int) -> None:
    source = seal_tools(shared_data, name, sample=150)
    data = prepare(tiny_tokenizer(), source)
    check(data, "seal_tools", rows)
    for item in data.eval_rows:
        assert item.tools is not None
        offered = [tool["function"]["name"] for tool in item.tools]
        called = {call["function"]["name"] for call in item.messages[1]["tool_calls"]}
        assert called <= set(offered)
        assert len(offered) == len(set(offered)) == len(called) + 9
        assert item.scoring == "tool_calls"


@pytest.mark.real_model
def test_real_tokenizer_drops_nothing(
    shared_data: Path, real_tokenizer: PreTrainedTokenizerBase
) -> None:
    check(prepare(real_tokenizer, seal_tools(shared_data, "dev"), 4096), "seal_tools", 700)
    mbpp = SourceConfig(source=str(shared_data / "mbpp"))
    check(prepare(real_tokenizer, mbpp, 1024), "mbpp", 397, 91)
    gsm8k = SourceConfig(source=str(shared_data / "gsm8k" / "test.jsonl"))
    check(prepare(real_tokenizer, gsm8k, 1024), "gsm8k", 1319)
    react = SourceConfig(source=str(shared_data / "react_traces"), format="react")
    check(prepare(real_tokenizer, react, 1024), "react", 500)


@pytest.mark.real_model
def test_real_tokenizer_survives_saving(
    tmp_path: Path, real_tokenizer: PreTrainedTokenizerBase
) -> None:
    real_tokenizer.save_pretrained(tmp_path)
    again = type(real_tokenizer).from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(real_tokenizer)


@pytest.mark.real_model
def test_real_header_is_the_assistant_line(real_tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = make_renderer(real_tokenizer)
    (conversation,) = kept(*tokenize(renderer, row(chat("hi", "yo")))).conversations
    (turn,) = conversation.turns
    header = conversation.token_ids[turn.prompt_length - turn.header_length : turn.prompt_length]
    assert renderer.decode(header) == "<|im_start|>assistant\n"
    assert conversation.token_ids[turn.end - 1] == real_tokenizer.eos_token_id
