"""Answers taken apart into text and calls, whole and in pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefillshare_train.serving.server.tool_calls import Call, Piece, ToolCallParser

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
SUB = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'
HALF = r'<tool_call>{"name": "add", "arguments": {"a": "\ud83d"}}</tool_call>'
ADDED = Call("add", '{"a": 1, "b": "é"}')
SUBBED = Call("sub", "{}")


def parse(*parts: str) -> list[Piece]:
    """The pieces, with neighbouring texts joined."""
    parser = ToolCallParser(["add", "sub"])
    pieces = [piece for part in parts for piece in parser.feed(part)]
    joined: list[Piece] = []
    for piece in [*pieces, *parser.finish()]:
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Plain.", ["Plain."]),
        ("  spaces kept  ", ["  spaces kept  "]),
        (ADD, [ADDED]),
        (f"{ADD}\n{SUB}", [ADDED, SUBBED]),
        (f"I add.\n{ADD}\n", ["I add.", ADDED]),
        (f"{ADD} Done.", [ADDED, "Done."]),
        (HALF, [Call("add", '{"a": "\\ud83d"}')]),
        (HALF.replace("add", r"\ud83d"), [HALF.replace("add", r"\ud83d")]),
        ("1 < 2 and <tool", ["1 < 2 and <tool"]),
        (ADD.removesuffix("\n</tool_call>"), [ADDED]),
        (ADD[:30], [ADD[:30]]),
        ("So \n<tool_call>{bad</tool_call>!", ["So \n<tool_call>{bad</tool_call>!"]),
        (f"<tool_call>[]</tool_call>{SUB}", ["<tool_call>[]</tool_call>", SUBBED]),
        ('{"name": "add", "parameters": {"a": 2}}', [Call("add", '{"a": 2}')]),
        ('[{"name": "sub"}]', [SUBBED]),
        ('<|python_tag|>{"name": "sub"}', [SUBBED]),
        ('{"name": "Ada", "arguments": {}}', ['{"name": "Ada", "arguments": {}}']),
        ("[1] is a source", ["[1] is a source"]),
        (f"[see] {SUB}", ["[see]", SUBBED]),
        ("", []),
    ],
)
def test_what_an_answer_holds(answer: str, expected: list[Piece]) -> None:
    assert parse(answer) == expected
    assert parse(*answer) == expected


@given(
    st.lists(
        st.sampled_from(
            [ADD, SUB, "text", " ", "\n", "<", "<tool_call>", "</tool_call>", "{", "["]
        ),
        max_size=6,
    ),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_the_cuts_of_a_stream_change_nothing(parts: list[str], cuts: list[int]) -> None:
    answer = "".join(parts)
    places = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    streamed = [answer[a:b] for a, b in itertools.pairwise(places)]
    assert parse(*streamed) == parse(answer)


def test_a_call_comes_as_soon_as_its_block_is_closed() -> None:
    parser = ToolCallParser(["add"])
    assert parser.feed("Now ") == ["Now"]
    assert parser.feed(ADD[:-1]) == []
    assert parser.feed(">") == [ADDED]
    assert json.loads(ADDED.arguments) == {"a": 1, "b": "é"}


def test_text_is_not_held_back_without_need() -> None:
    parser = ToolCallParser(["add"])
    assert parser.feed("Two words") == ["Two words"]
    assert parser.feed(" a <b> c") == [" a <b> c"]
