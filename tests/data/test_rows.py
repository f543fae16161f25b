"""The normal form of messages, calls and tools, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.data.helpers import chat, message

from prefillshare_train.data import RowError
from prefillshare_train.data.rows import (
    Record,
    make_row,
    normalise_calls,
    normalise_messages,
    normalise_tools,
    text_of,
)

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "f", "arguments": {"a": 1}}}],
        [{"name": "f", "arguments": '{"a": 1}'}],
        {"name": "f", "arguments": {"a": 1}},
        '[{"name": "f", "arguments": {"a": 1}}]',
        [{"name": "f", "parameters": {"a": 1}}],
        [{"function": {"name": "f", "parameters": '{"a": 1}', "arguments": None}}],
    ],
)
def test_calls_of_every_form_become_one(calls: Any) -> None:
    assert normalise_calls(calls, "message 1", "x:1") == [CALL]


def test_calls_keep_their_id_and_may_lack_arguments() -> None:
    with_id, empty, null = normalise_calls(
        [
            {"id": "7", "function": {"name": "f", "arguments": "{}"}},
            {"name": "g", "arguments": ""},
            {"name": "h"},
        ],
        "message 1",
        "x:1",
    )
    assert with_id["id"] == "7"
    assert [item["function"]["arguments"] for item in (with_id, empty, null)] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ("[{", "message 2: tool_calls is not valid JSON"),
        (3, "message 2: tool_calls is not a list: 3"),
        ([{"arguments": {}}], "message 2: a tool call has no name"),
        ([{"name": " "}], "message 2: a tool call has no name"),
        (["f"], "message 2: a tool call has no name: 'f'"),
        ([{"name": "f", "arguments": "{"}], "arguments of f is not valid JSON"),
        ([{"name": "f", "arguments": [1]}], r"arguments of f are not an object: \[1\]"),
        ([{"name": "f", "args": {"a": 1}}], "message 2: the call of f has 'args'"),
        ([{"function": {"name": "f", "input": {}}}], "message 2: the call of f has 'input'"),
        ([{"function": {"name": "f"}, "arguments": {"a": 1}}], "the call of f has 'arguments'"),
        ([{"function": {"name": "f"}, "parameters": {"a": 1}}], "the call of f has 'parameters'"),
        ([{"name": "f", "arguments": {}, "parameters": {"a": 1}}], "both arguments and param"),
    ],
)
def test_bad_calls(calls: Any, found: str) -> None:
    messages = [message("user", "hi"), message("assistant", "", tool_calls=calls)]
    with pytest.raises(RowError, match=f"^x:1: .*{found}"):
        normalise_messages(messages, "x:1")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], r"messages should be a list of one or more but is \[\]"),
        ("{", "messages is not valid JSON"),
        ("{}", "messages should be a list"),
        ([3], "message 1 is not an object: 3"),
        ([{"content": "a"}], "message 1 has no role"),
        ([message("narrator", "a")], "message 1 has the unknown role 'narrator'"),
        ([message("user", "a"), message("assistant", " \n")], "message 2 is an assistant message"),
        ([message("user", "a"), {"role": "assistant"}], "message 2 is an assistant message"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 has content that is not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content that is not text"),
        ([message("user", "a", tool_calls=[{"name": "f"}])], "has tool_calls but its role is"),
        ([message("assistant", "a", weight=0.5)], "message 1 has weight 0.5"),
        (
            [message("assistant", "a", tool_calls=[CALL], function_call={"name": "f"})],
            "message 1 has both tool_calls and function_call",
        ),
    ],
)
def test_bad_messages(messages: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"^x:1: .*{found}"):
        normalise_messages(messages, "x:1")


def test_messages_in_unusual_but_clear_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = normalise_messages(
        [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "function", "content": "r"},
            {"role": "assistant", "content": "", "weight": 0},
        ],
        "x:1",
    )
    assert found == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "", "weight": 0},
    ]


def test_a_legacy_function_call_becomes_a_tool_call() -> None:
    legacy = {"name": "f", "arguments": '{"a": 1}'}
    found = normalise_messages([message("assistant", "let me look", function_call=legacy)], "x:1")
    assert found == [message("assistant", "let me look", tool_calls=[CALL])]


HALF = "\\ud83d"


@pytest.mark.parametrize(
    "spoiled",
    [
        message("user", HALF),
        message("assistant", "a", reasoning_content=HALF),
        message("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": [HALF]}}]),
        message("assistant", "", tool_calls=[{"name": "f", "arguments": {HALF: 1}}]),
        message("assistant", "", tool_calls=[{"name": "f", "arguments": f'{{"a": "{HALF}"}}'}]),
    ],
)
def test_half_a_surrogate_pair_is_told_with_its_row(spoiled: dict[str, Any]) -> None:
    messages = json.loads(json.dumps([message("user", "😀"), spoiled]).replace("\\\\ud", "\\ud"))
    with pytest.raises(RowError, match=r"^x:1: message 2 holds half a surrogate pair, which is no"):
        normalise_messages(messages, "x:1")


def test_half_a_surrogate_pair_in_a_tool() -> None:
    schema = {"name": "g", "parameters": {"properties": {"a": {"enum": ["\ud83d"]}}}}
    with pytest.raises(RowError, match=r"^x:1: tool 2 holds half a surrogate pair"):
        normalise_tools([{"name": "f"}, schema], "x:1")


def test_input_is_not_changed() -> None:
    messages = [{"role": "function", "content": None}]
    normalise_messages(messages, "x:1")
    assert messages == [{"role": "function", "content": None}]


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "parameters": {}}],
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        '[{"name": "f", "parameters": {}}]',
    ],
)
def test_tools_of_every_form_become_one(tools: Any) -> None:
    expected = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert normalise_tools(tools, "x:1") == expected


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools: Any) -> None:
    assert normalise_tools(tools, "x:1") is None


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        ("[{", "tools is not valid JSON"),
        ({"name": "f"}, "tools is not a list"),
        ([{"description": "d"}], "a tool has no name"),
        ([{"name": ""}], "a tool has no name"),
        (["f"], "a tool has no name: 'f'"),
    ],
)
def test_bad_tools(tools: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"^x:1: {found}"):
        normalise_tools(tools, "x:1")


def test_missing_column_names_it_and_what_there_is() -> None:
    record = Record({"question": "q", "n": 3, "empty": None}, "x.jsonl:4", 3)
    with pytest.raises(
        RowError, match=r"x.jsonl:4: key 'prompt' is missing; found 'question', 'n'"
    ):
        text_of(record, "prompt")
    with pytest.raises(RowError, match="'n' should be text but is int: 3"):
        text_of(record, "n")
    with pytest.raises(RowError, match="'empty' should be text but is NoneType"):
        text_of(record, "empty")
    assert text_of(record, "empty", default="d") == text_of(record, "prompt", default="d") == "d"


def test_id_and_scoring() -> None:
    plain = make_row(Record({}, "x:1", 0), chat("a", "b"))
    named = make_row(Record({"id": 7}, "x:1", 0), chat("a", "b"), scoring="math")
    calls = [message("user", "a"), message("assistant", "", tool_calls=[CALL])]
    assert (plain.id, plain.scoring) == ("x:1", "text")
    assert (named.id, named.scoring) == ("7", "math")
    assert make_row(Record({}, "x:1", 0), calls).scoring == "tool_calls"
    assert make_row(Record({}, "x:1", 0), [*calls, message("assistant", "b")]).scoring == "text"


def test_long_values_are_shortened_in_errors() -> None:
    with pytest.raises(RowError) as error:
        normalise_messages(["a" * 1000], "x:1")
    assert len(str(error.value)) < 250
    assert " ... " in str(error.value)
