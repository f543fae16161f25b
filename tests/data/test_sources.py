"""Sources as a whole: every bad row is listed, samples repeat, columns are renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import chat, message, pairs, write_jsonl

from prefillshare_train.data import DataError, SourceConfig
from prefillshare_train.data.report import SourceReport
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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": chat("q", "a"), "system": "s"}),
        ("messages", {"messages": [message("system", "s"), *chat("q", "a")], "system": "s"}),
        ("prompt_completion", {"prompt": "q", "completion": "a", "system": "s"}),
        (
            "prompt_completion",
            {"prompt": chat("q"), "completion": chat("q", "a")[1:], "system": "s"},
        ),
        ("sharegpt", {"conversations": chat("q", "a"), "system": "s"}),
        ("alpaca", {"instruction": "q", "output": "a", "system": "s"}),
        ("metamath", {"query": "q", "response": "a", "system": "s", "history": []}),
    ],
)
def test_system_columns_come_first(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    loaded = load(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert (loaded.format, loaded.unread) == (name, ())
    assert loaded.rows[0].messages == [message("system", "s"), *chat("q", "a")]


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    row = {"messages": [message("system", "t"), *chat("q", "a")], "system": "s"}
    with pytest.raises(DataError, match=r"'system' is 's', but .* another system message: 't'"):
        load(write_jsonl(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize("columns", [("query", "response"), ("instruction", "output")])
@pytest.mark.parametrize("as_text", [False, True])
def test_history_becomes_earlier_turns(
    tmp_path: Path, columns: tuple[str, str], as_text: bool
) -> None:
    history: Any = [["q1", "a1"], ["q2", "a2"]]
    row = dict(zip(columns, ("q3", "a3"), strict=True)) | {
        "history": json.dumps(history) if as_text else history,
        "system": "s",
    }
    (found,) = load(write_jsonl(tmp_path / "rows.jsonl", [row])).rows
    assert found.messages == [message("system", "s"), *chat("q1", "a1", "q2", "a2", "q3", "a3")]


@pytest.mark.parametrize(
    ("history", "found"),
    [
        ("[[", "'history' is not valid JSON"),
        ({"q": "a"}, "'history' is not a list"),
        ([["q", "a"], ["q"]], r"item 2 of 'history' is no pair of texts: \['q'\]"),
        ([["q", ""]], "message 2 is an assistant message without text"),
    ],
)
def test_bad_history(tmp_path: Path, history: Any, found: str) -> None:
    row = {"instruction": "q", "output": "a", "history": history}
    with pytest.raises(DataError, match=f"rows.jsonl:1: {found}"):
        load(write_jsonl(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "row", "key"),
    [
        ("gsm8k", {"context": "c", "question": "q", "answer": "a"}, "context"),
        ("alpaca", {"instruction": "q", "context": "c", "output": "a"}, "context"),
        ("messages", {"messages": chat("q", "a"), "functions": [{"name": "f"}]}, "functions"),
        (
            "prompt_completion",
            {"prompt": "q", "completion": "a", "history": [["q", "a"]]},
            "history",
        ),
        ("gsm8k", {"question": "q", "answer": "a", "system": "s"}, "system"),
        ("metamath", {"query": "q", "response": "a", "tools": "[{}]"}, "tools"),
    ],
)
def test_context_that_a_format_does_not_read_is_refused(
    tmp_path: Path, name: str, row: dict[str, Any], key: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"rows.jsonl:1: the format {name} does not read '{key}'"):
        load(path)
    assert load(path, columns={"unused": key}).unread == ("unused",)
    for nothing in (None, "", " ", [], "[]"):
        assert load(write_jsonl(path, [row | {key: nothing}])).unread == ()


def test_other_columns_are_listed_once(tmp_path: Path) -> None:
    rows = [pair | {"type": "x", "n": n, "id": n, "empty": ""} for n, pair in enumerate(pairs(3))]
    loaded = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert loaded.unread == ("type", "n")
    assert SourceReport.of("rows.jsonl", loaded).lines() == [
        "rows.jsonl (prompt_completion): 3 rows read",
        "  columns not read: type, n",
    ]
