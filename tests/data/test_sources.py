"""Sources as a whole: every bad row is listed, samples repeat, columns are renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import chat, pairs, write_jsonl

from prefillshare_train.data import DataError, SourceConfig
from prefillshare_train.data.sources import LoadedRows, load_rows

SPEC = {
    "api_name": "f",
    "api_description": "does f",
    "parameters": {"a": {"type": "str", "description": "an a"}},
    "required": ["a"],
}


def load(path: Path, *, seed: int = 0, **source: Any) -> LoadedRows:
    return load_rows(SourceConfig(source=str(path), **source), base_dir=path.parent, seed=seed)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": chat("a", "b")}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}),
        ("alpaca", {"instruction": "a", "output": "b"}),
        ("metamath", {"query": "a", "response": "b"}),
        ("xlam", {"query": "a", "tools": '[{"name": "f"}]', "answers": '[{"name": "f"}]'}),
        ("gsm8k", {"question": "a", "answer": "b"}),
        ("mbpp", {"prompt": "a", "solution": "b", "entry_point": "c"}),
        ("seal_tools", {"query": "a", "calling": [{"api": "f", "parameters": {"a": "x"}}]}),
    ],
)
def test_format_by_name_and_by_columns(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    options: dict[str, Any] = {}
    if name == "seal_tools":
        options["tools_file"] = str(write_jsonl(tmp_path / "tool.jsonl", [SPEC]))
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    found = load(path, **options)
    assert found.format == name
    assert found.rows == load(path, format=name, **options).rows


def test_formats_with_the_columns_of_alpaca_go_by_name_only(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "Thought: a\nObservation: b\nThought: c"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert load(path).format == "alpaca"
    assert len(load(path).rows[0].messages) == 2
    assert len(load(path, format="react").rows[0].messages) == 4
    assert load(path, format="evol_instruct_code").format == "evol_instruct_code"


def test_all_bad_rows_are_listed_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    lines = [good, "{broken", good.replace("user", "wizard"), "", '{"message": 1}', good]
    path.write_text("\n".join([*lines, good.replace('"b"', '" "')]))
    with pytest.raises(DataError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith("4 of 6 rows are bad:")
    assert f"{path}:2: not valid JSON" in text
    assert f"{path}:3: message 1 has the unknown role 'wizard'" in text
    assert f"{path}:5: key 'messages' is missing; found 'message'" in text
    assert f"{path}:7: message 2 is an assistant message without text" in text


def test_long_list_of_bad_rows_is_cut(tmp_path: Path) -> None:
    rows = [{"prompt": 1, "completion": "b"}] * 25
    with pytest.raises(DataError, match=r"25 of 25 rows are bad(?s:.*)\.\.\. and 15 more") as error:
        load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(str(error.value).splitlines()) == 12


def test_sample_is_drawn_by_seed_and_kept_in_file_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(50))
    drawn = [[row.origin for row in load(path, sample=10, seed=seed).rows] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    lines = [int(origin.rsplit(":", 1)[1]) for origin in drawn[0]]
    assert len(set(lines)) == 10
    assert lines == sorted(lines) != list(range(1, 11))
    assert len(load(path, sample=99).rows) == 50


def test_sample_counts_rows_that_the_format_keeps(tmp_path: Path) -> None:
    rows = [
        {"prompt": "def f():", "solution": "x", "entry_point": "f", "is_solved": bool(n % 2)}
        for n in range(10)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load(path, sample=5)
    assert (len(loaded.rows), loaded.filtered, loaded.rows_read) == (5, 5, 10)
    with pytest.raises(DataError, match=r"has no usable row \(1 read\)"):
        load(write_jsonl(tmp_path / "unsolved.jsonl", rows[:1]))


def test_empty_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no usable row \(0 read\)"):
        load(write_jsonl(tmp_path / "rows.jsonl", []))


def test_columns_are_renamed_before_the_format_is_decided(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "a": "b", "answer": "c"}])
    loaded = load(path, columns={"prompt": "q", "completion": "a"})
    assert loaded.format == "prompt_completion"
    assert loaded.rows[0].messages == chat("a", "b")
    with pytest.raises(DataError, match=r"columns names 'x'; found 'q', 'a', 'answer'"):
        load(path, columns={"prompt": "x"})


def test_columns_may_swap_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "b", "completion": "a"}])
    loaded = load(path, columns={"prompt": "completion", "completion": "prompt"})
    assert loaded.rows[0].messages == chat("a", "b")


def test_seal_tools_options(tmp_path: Path) -> None:
    rows = [{"id": "1", "query": "q", "calling": [{"api": "f", "parameters": {"a": "x"}}]}] * 3
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "pool" / "tool.jsonl", [SPEC])
    loaded = load(path, tools_file="pool/tool.jsonl")
    assert (loaded.format, len(loaded.rows)) == ("seal_tools", 3)
    with pytest.raises(DataError, match="format seal_tools needs tools_file"):
        load(path)
    with pytest.raises(DataError, match=r"^tools_file: none.jsonl was not found"):
        load(path, tools_file="none.jsonl")
    with pytest.raises(DataError, match=r"distractors is 1, but .* has only 1 tools"):
        load(path, tools_file="pool/tool.jsonl", distractors=1)


def test_bad_pool_is_told_once_and_as_such(tmp_path: Path) -> None:
    rows = [{"query": "q", "calling": [{"api": "f", "parameters": {}}]}] * 3
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    pool = write_jsonl(tmp_path / "tool.jsonl", [SPEC, SPEC])
    with pytest.raises(DataError) as error:
        load(path, tools_file="tool.jsonl")
    assert str(error.value) == f"tools_file: {pool}:2: tool 'f' occurs twice. Remove one"


def test_tools_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(1))
    with pytest.raises(DataError, match=r"read by format seal_tools only, but .* prompt_comp"):
        load(path, distractors=2)
