"""The general formats, and how a format is told by its columns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.data.helpers import chat, message, record, tool

from prefillshare_train.data import DataError, RowError, formats

CALL = {"name": "f", "arguments": {"a": 1}}
NORMAL_CALL = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("messages tools", "messages"),
        ("id conversations", "sharegpt"),
        ("query tools answers", "xlam"),
        ("id query calling", "seal_tools"),
        ("type query response original_question", "metamath"),
        ("question answer", "gsm8k"),
        ("name prompt solution entry_point test", "mbpp"),
        ("prompt completion", "prompt_completion"),
        ("instruction input output", "alpaca"),
    ],
)
def test_format_by_columns(columns: str, name: str) -> None:
    assert formats.detect_format(columns.split(), "x:1") == name


def test_unknown_columns_list_the_known_formats() -> None:
    with pytest.raises(DataError, match=r"x:1: no known format has the columns a, b\. .*gsm8k"):
        formats.detect_format(["b", "a"], "x:1")


def test_messages() -> None:
    row = formats.messages(record({"messages": chat("a", "b"), "tools": [tool("f")], "id": 3}))
    assert row.messages == chat("a", "b")
    assert row.tools == [tool("f")]
    assert (row.id, row.origin) == ("3", "rows.jsonl:1")
    with pytest.raises(RowError, match="key 'messages' is missing; found 'text'"):
        formats.messages(record({"text": "a"}))


def test_prompt_completion_as_text() -> None:
    row = formats.prompt_completion(record({"prompt": "a", "completion": "b"}))
    assert row.messages == chat("a", "b")
    with pytest.raises(RowError, match="key 'completion' is missing; found 'prompt'"):
        formats.prompt_completion(record({"prompt": "a"}))
    with pytest.raises(RowError, match="message 2 is an assistant message without text"):
        formats.prompt_completion(record({"prompt": "a", "completion": ""}))


def test_prompt_completion_as_messages_trains_the_completion_only() -> None:
    row = formats.prompt_completion(
        record(
            {
                "prompt": chat("a", "b", "c"),
                "completion": [message("assistant", "", tool_calls=[CALL])],
                "tools": [tool("f")],
            }
        )
    )
    assert [item.get("weight", 1) for item in row.messages] == [1, 0, 1, 1]
    assert row.messages[3]["tool_calls"] == [NORMAL_CALL]
    assert row.scoring == "tool_calls"


def test_alpaca() -> None:
    both = formats.alpaca(record({"instruction": "i", "input": "x", "output": "o", "system": "s"}))
    assert both.messages == [message("system", "s"), *chat("i\n\nx", "o")]
    for values in ({}, {"input": " "}, {"input": None}):
        row = formats.alpaca(record({"instruction": "i", "output": "o", **values}))
        assert row.messages == chat("i", "o")


def test_sharegpt() -> None:
    values: dict[str, Any] = {
        "system": "s",
        "tools": '[{"name": "f", "parameters": {}}]',
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"from": "gpt", "value": "d"},
        ],
    }
    row = formats.sharegpt(record(values))
    assert row.messages == [
        message("system", "s"),
        message("user", "a"),
        message("assistant", "", tool_calls=[NORMAL_CALL]),
        message("tool", "r"),
        message("assistant", "b", weight=0),
        *chat("c", "d"),
    ]
    assert row.tools is not None
    assert row.tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_sharegpt_keeps_reasoning_and_calls_beside_text(key: str) -> None:
    answer = {"from": "gpt", "value": "b", key: "hm", "function_call": CALL}
    row = formats.sharegpt(record({"conversations": [{"from": "human", "value": "a"}, answer]}))
    expected: dict[str, Any] = {key: "hm", "tool_calls": [NORMAL_CALL]}
    assert row.messages[1] == message("assistant", "b", **expected)


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_sharegpt_calls_by_either_key(key: str) -> None:
    call = {"name": "f", key: {"a": 1}}
    items = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]
    row = formats.sharegpt(record({"conversations": items}))
    assert row.messages[1]["tool_calls"] == [NORMAL_CALL]


@pytest.mark.parametrize(
    ("conversations", "found"),
    [
        (None, "'conversations' should be a list"),
        ([{"from": "alien", "value": "a"}], "message 1 is from 'alien', which is no known role"),
        ([{"value": "a"}], "message 1 is from None"),
        ([{"from": "human"}], "message 1 has no value"),
        (["a"], "message 1 is not an object"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}], "message 2 is an assist"),
    ],
)
def test_bad_sharegpt(conversations: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"rows.jsonl:1: {found}"):
        formats.sharegpt(record({"conversations": conversations}))
