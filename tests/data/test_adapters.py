"""Rows of particular data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import chat, message, record, write_jsonl

from prefillshare_train.data import DataError, Row, RowError, adapters
from prefillshare_train.data.seal_tools import SealTools
from prefillshare_train.data.tool_schema import type_schema


def test_metamath_is_scored_as_maths_where_it_ends_as_maths() -> None:
    row = adapters.metamath(record({"query": "q", "response": "so\nThe answer is: 4"}))
    assert (row.messages, row.scoring) == (chat("q", "so\nThe answer is: 4"), "math")
    assert adapters.metamath(record({"query": "q", "response": "in 1999"})).scoring == "text"


def test_evol_instruct_code() -> None:
    row = adapters.evol_instruct_code(record({"instruction": "i", "output": "o"}))
    assert (row.messages, row.scoring) == (chat("i", "o"), "text")


def test_gsm8k_loses_its_calculator_annotations() -> None:
    answer = "She has 4/2 = <<4/2=2>>2 left, $<<2*3=6>>6.\n#### 6"
    row = adapters.gsm8k(record({"question": "q", "answer": answer}))
    assert row.messages == chat("q", "She has 4/2 = 2 left, $6.\n#### 6")
    assert row.scoring == "math"


@pytest.mark.parametrize(
    "answer",
    [
        "use a << 2 >> b, cin<<x>>y",
        "She has <<4/2=2>>2 left",
        "#### f(cout << a = b >> c)\ncout<<n=1>>2",
    ],
)
def test_other_answers_under_the_columns_of_gsm8k_lose_nothing(answer: str) -> None:
    row = adapters.gsm8k(record({"question": "q", "answer": answer}))
    assert row.messages == chat("q", answer)
    assert row.scoring == ("math" if "####" in answer else "text")


@pytest.mark.parametrize("sum_", ["48/2=24", "(1+2) * 3 = 9", "20*.01=0.2", "5%*$1,000=$50", "=-3"])
def test_gsm8k_annotations_of_every_form_are_stripped(sum_: str) -> None:
    row = adapters.gsm8k(record({"question": "q", "answer": f"a <<{sum_}>>b\n#### 1"}))
    assert row.messages == chat("q", "a b\n#### 1")


def test_mbpp_keeps_solved_problems_only() -> None:
    values = {"prompt": "def f():\n", "solution": "\ndef f():\n  return 1\n", "entry_point": "f"}
    for solved in ({}, {"is_solved": True}, {"is_solved": "True"}):
        row = adapters.mbpp(record({**values, **solved}))
        assert row is not None
        prompt, answer = (item["content"] for item in row.messages)
        assert prompt.endswith("```python\ndef f():\n```")
        assert answer == "```python\ndef f():\n  return 1\n```"
    for solved in ({"is_solved": False}, {"is_solved": "False"}):
        assert adapters.mbpp(record({**values, **solved})) is None


def test_mbpp_braces_are_kept() -> None:
    row = adapters.mbpp(record({"prompt": "def f(): return {0}", "solution": "{x}"}))
    assert row is not None
    assert "return {0}" in row.messages[0]["content"]
    assert "{x}" in row.messages[1]["content"]


XLAM_TOOL = {
    "name": "f",
    "description": "d",
    "parameters": {
        "a": {"type": "int", "description": "first"},
        "b": {"type": "List[str], optional", "description": "second"},
        "c": {"type": "Optional[float]"},
        "d": {"type": "str", "default": "x"},
        "type": {"type": "bool"},
    },
}


def xlam(tools: Any, answers: Any) -> Row:
    return adapters.xlam(record({"query": "q", "tools": tools, "answers": answers}))


def test_xlam_json_strings() -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]
    row = xlam(json.dumps([XLAM_TOOL]), json.dumps(calls))
    assert row.tools is not None
    function = row.tools[0]["function"]
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "first"},
            "b": {"type": "array", "items": {"type": "string"}, "description": "second"},
            "c": {"type": "number"},
            "d": {"type": "string", "default": "x"},
            "type": {"type": "boolean"},
        },
        "required": ["a", "type"],
    }
    assert [call["function"] for call in row.messages[1]["tool_calls"]] == calls
    assert row.scoring == "tool_calls"
    assert xlam([XLAM_TOOL], calls).messages == row.messages
    renamed = [{"name": call["name"], "parameters": call["arguments"]} for call in calls]
    assert xlam([XLAM_TOOL], renamed).messages == row.messages


def test_xlam_tools_that_are_json_schema_stay_as_they_are() -> None:
    schema = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    row = xlam([schema], [{"name": "f"}])
    assert row.tools == [{"type": "function", "function": schema}]


@pytest.mark.parametrize(
    ("tools", "answers", "found"),
    [
        ("[{", "[]", "tools is not valid JSON"),
        ([XLAM_TOOL], '[{"name": "f"', "answers is not valid JSON"),
        ([XLAM_TOOL], "[]", "'answers' should be a list of one or more"),
        (None, [{"name": "f"}], "'tools' should be a list of one or more but is None"),
        ([{"parameters": {}}], [{"name": "f"}], "a tool has no name"),
        ([{"name": "f", "parameters": {"a": 3}}], [{"name": "f"}], "parameter 'a' is not an obj"),
        ([XLAM_TOOL], [{"arguments": {}}], "a tool call has no name"),
    ],
)
def test_bad_xlam(tools: Any, answers: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"rows.jsonl:1: .*{found}"):
        xlam(tools, answers)


def test_react_steps_become_turns() -> None:
    output = (
        "Thought: t1\nAction: a1\nObservation: o1\nmore\n"
        "Thought 2: t2\nAction 2: a2\nObservation 2: done\n"
    )
    row = adapters.react(record({"instruction": "q", "input": "", "output": output}))
    assert row.messages == chat(
        "q",
        "Thought: t1\nAction: a1",
        "Observation: o1\nmore",
        "Thought 2: t2\nAction 2: a2",
    )
    with pytest.raises(RowError, match="'output' does not begin with a Thought"):
        adapters.react(record({"instruction": "q", "output": "Hm. Thought: t"}))


POOL = [
    {
        "api_name": f"tool{number}",
        "api_description": f"does {number}",
        "parameters": {
            "a": {"type": "int", "description": "first", "choices": [1, 2], "unit": "m"},
            "b": {"type": "str", "default": "x"},
        },
        "required": ["a"],
    }
    for number in range(12)
]


def seal_row(index: int = 0, *apis: str) -> dict[str, Any]:
    return {
        "id": f"row-{index}",
        "query": "q",
        "calling": [{"api": api, "parameters": {"a": 1}, "responses": ["r"]} for api in apis],
    }


def offered(row: Row) -> list[str]:
    assert row.tools is not None
    return [item["function"]["name"] for item in row.tools]


def test_seal_tools_row(tmp_path: Path) -> None:
    pool = SealTools(write_jsonl(tmp_path / "tool.jsonl", POOL), distractors=0, seed=0)
    row = pool.row(record(seal_row(0, "tool3")))
    call = {"type": "function", "function": {"name": "tool3", "arguments": {"a": 1}}}
    assert row.messages == [message("user", "q"), message("assistant", "", tool_calls=[call])]
    assert row.tools == [
        {
            "type": "function",
            "function": {
                "name": "tool3",
                "description": "does 3",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {"type": "integer", "description": "first (unit: m)", "enum": [1, 2]},
                        "b": {"type": "string", "description": "", "default": "x"},
                    },
                    "required": ["a"],
                },
            },
        }
    ]
    assert (row.id, row.scoring) == ("row-0", "tool_calls")


def test_seal_tools_distractors_depend_on_seed_and_place_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "tool.jsonl", POOL)
    rows = [record(seal_row(index, "tool3", "tool5", "tool3"), index) for index in range(20)]
    first = [offered(SealTools(path, 4, seed=1).row(item)) for item in rows]
    pool = SealTools(path, 4, seed=1)
    assert [offered(pool.row(item)) for item in reversed(rows)] == first[::-1]
    assert [offered(SealTools(path, 4, seed=2).row(item)) for item in rows] != first
    for names in first:
        assert len(names) == len(set(names)) == 6
        assert {"tool3", "tool5"} < set(names)
    assert len(set(map(tuple, first))) > 10
    assert {names.index("tool3") for names in first} >= {0, 1, 2, 3}, "the called ones move"


def test_seal_tools_order_of_the_pool_does_not_matter(tmp_path: Path) -> None:
    forward = SealTools(write_jsonl(tmp_path / "a.jsonl", POOL), 4, seed=1)
    backward = SealTools(write_jsonl(tmp_path / "b.jsonl", POOL[::-1]), 4, seed=1)
    item = record(seal_row(0, "tool3"))
    assert offered(forward.row(item)) == offered(backward.row(item))


def test_bad_seal_tools(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "tool.jsonl", POOL)
    pool = SealTools(path, 2, seed=0)
    with pytest.raises(RowError, match=r"the called tool 'gone' is not in .*tool.jsonl"):
        pool.row(record(seal_row(0, "gone")))
    with pytest.raises(RowError, match="'calling' should be a list of one or more"):
        pool.row(record(seal_row(0)))
    with pytest.raises(DataError, match=r"distractors is 12, but .* has only 12 tools"):
        SealTools(path, 12, seed=0)
    for line, found in (
        (POOL[0], r"tool.jsonl:13: tool 'tool0' occurs twice"),
        ({"name": "x"}, r"tool.jsonl:13: key 'api_name' is missing; found 'name'"),
        ({"api_name": "x"}, r"tool.jsonl:13: 'parameters' should be an object"),
        ({"api_name": "x", "parameters": {"a": {}}}, r"tool.jsonl:13: parameter 'a' has no type"),
        ([1], r"tool.jsonl:13: not a JSON object"),
    ):
        write_jsonl(path, [*POOL, line])
        with pytest.raises(RowError, match=found):
            SealTools(path, 2, seed=0)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("int", {"type": "integer"}),
        (" Bool ", {"type": "boolean"}),
        ("list", {"type": "array"}),
        ("List[str]", {"type": "array", "items": {"type": "string"}}),
        ("List[List]", {"type": "array", "items": {"type": "array"}}),
        ("Tuple[int, str]", {"type": "array"}),
        ("Dict[str, int]", {"type": "object"}),
        ("Optional[float]", {"type": "number"}),
        ("Callable", {}),
        ("", {}),
    ],
)
def test_type_names(name: str, schema: dict[str, Any]) -> None:
    assert type_schema(name) == schema
