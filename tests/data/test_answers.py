"""Scoring of generated answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.helpers import message

from prefillshare_train.data import is_correct, parse_tool_calls
from prefillshare_train.data.answers import final_answer

A = {"name": "f", "arguments": {"x": 1, "y": "b"}}
B = {"name": "g", "arguments": {}}
REFERENCE = message(
    "assistant",
    "",
    tool_calls=[{"type": "function", "function": A}, {"type": "function", "function": B}],
)
BLOCK_A = '<tool_call>\n{"name": "f", "arguments": {"y": "b", "x": 1}}\n</tool_call>'
BLOCK_B = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        f"{BLOCK_A}\n{BLOCK_B}",
        f"{BLOCK_B}{BLOCK_A}",
        f"I will look. {BLOCK_A}\n{BLOCK_B.removesuffix('</tool_call>')}",
        '<tool_call>[{"name": "g"}, {"name": "f", "arguments": {"x": 1.0, "y": "b"}}]</tool_call>',
        '[{"name": "f", "arguments": {"x": 1, "y": "b"}}, {"name": "g", "arguments": {}}]',
        '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"x": 1, "y": "b"}}',
        '[TOOL_CALLS][{"name": "g"}, {"name": "f", "arguments": "{\\"x\\": 1, \\"y\\": \\"b\\"}"}]',
        ' <|python_tag|>{"function": {"name": "g"}}{"name": "f", "arguments": {"x": 1, "y": "b"}}',
    ],
)
def test_same_calls_in_any_order_and_form(text: str) -> None:
    assert is_correct(text, REFERENCE, "tool_calls")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        BLOCK_A,
        f"{BLOCK_A}{BLOCK_A}",
        f"{BLOCK_A}{BLOCK_B}{BLOCK_B}",
        f"{BLOCK_A}{BLOCK_B}<tool_call>{{</tool_call>",
        f"{BLOCK_A}{BLOCK_B}".replace('"b"', '"B"'),
        f"{BLOCK_A}{BLOCK_B}".replace("1", "true"),
        f"{BLOCK_A}{BLOCK_B}".replace("1", '"1"'),
        f"{BLOCK_A}{BLOCK_B}".replace('"g"', '"h"'),
        f"{BLOCK_A}{BLOCK_B}".replace("{}", '{"z": null}'),
        f"{BLOCK_A}{BLOCK_B}".replace("1", "9" * 5000),
        "[" * 100_000,
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    ],
)
def test_other_calls_and_garbage_are_wrong(text: str) -> None:
    assert not is_correct(text, REFERENCE, "tool_calls")


def test_turn_without_calls_is_compared_as_text_where_the_row_has_calls() -> None:
    assert is_correct(" done\n", message("assistant", "done"), "tool_calls")
    assert not is_correct("Done", message("assistant", "done"), "tool_calls")


def test_parsed_calls() -> None:
    assert parse_tool_calls(BLOCK_A) == [A]
    assert parse_tool_calls('{"name": "g", "arguments": null}') == [B]
    assert parse_tool_calls("") is None
    assert parse_tool_calls("12") is None
    assert parse_tool_calls("[]") is None


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("so\n#### 1200", True),
        ("#### 1,200", True),
        ("####1200.00", True),
        ("#### $1200.", True),
        ("#### 1200 apples", True),
        ("The answer is: 1200", True),
        ("the answer is $1,200.", True),
        ("The answer is 1 but no.\nThe answer is 1200", True),
        ("we have 3, then 1200", True),
        ("#### 1200\nthat is 5 more", True),
        ("#### 1201", False),
        ("#### -1200", False),
        ("#### 12000", False),
        ("#### 1200\n#### 5", False),
        ("####", False),
        ("1200 is not 5", False),
        ("no number", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("reference", ["work 7\n#### 1,200", "work 7\nThe answer is: $1200"])
def test_final_number(generated: str, right: bool, reference: str) -> None:
    assert is_correct(generated, message("assistant", reference), "math") is right


def test_final_expression() -> None:
    reference = message("assistant", "so\nThe answer is: $\\frac{1}{2}$")
    assert is_correct("The answer is: \\frac{1} {2}.", reference, "math")
    assert not is_correct("The answer is: \\frac{1}{3}", reference, "math")
    assert not is_correct("I do not know", reference, "math")


def test_negative_and_decimal_numbers() -> None:
    assert is_correct("#### -0.50", message("assistant", "#### -.5"), "math")
    assert not is_correct("#### 0.5", message("assistant", "#### -.5"), "math")


def test_maths_without_any_answer_is_compared_as_text() -> None:
    assert final_answer("none") is None
    assert is_correct(" none ", message("assistant", "none"), "math")
    assert not is_correct("5", message("assistant", "none"), "math")


def test_text_is_compared_exactly_but_for_outer_space() -> None:
    reference = message("assistant", "a  b\n")
    assert is_correct("\na  b", reference, "text")
    assert not is_correct("a b", reference, "text")


@given(st.text(), st.sampled_from(["text", "math", "tool_calls"]))
def test_nothing_that_is_generated_raises(generated: str, scoring: Any) -> None:
    for reference in (REFERENCE, message("assistant", "#### 5"), message("assistant", "x")):
        assert is_correct(generated, reference, scoring) in (True, False)
