"""Whether a generated answer is right: exact match by the kind of answer.

Generated text may be anything; what cannot be read counts as wrong and never raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from prefillshare_train.data.rows import Message, Scoring

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_SEPARATOR = re.compile(r"[\s,;]*")
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FINAL = re.compile(r"(?:####|answer is:?)[ \t]*([^\n]*)", re.IGNORECASE)


def is_correct(generated: str, reference: Message, scoring: Scoring) -> bool:
    """Compare a generated answer with the assistant message it should equal.

    `tool_calls`: the same calls (name and arguments) in any order. `math`: the same final answer
    (after `####` or "the answer is", else the last number). `text`: equal but for white space at
    the ends.

    Args:
        generated: decoded without special tokens.
        reference: a message in the form of `Row.messages`.
    """
    content = str(reference.get("content", ""))
    if reference.get("tool_calls"):
        return same_calls(parse_tool_calls(generated), reference["tool_calls"])
    if scoring == "math":
        return same_final_answer(generated, content)
    return generated.strip() == content.strip()


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """Calls as `{"name", "arguments"}`, or None where the text has none or one is malformed.

    Reads `<tool_call>` blocks, and where there are none a text that is JSON as a whole: a call, a
    list of calls, or several calls in a row (after `[TOOL_CALLS]` or `<|python_tag|>`).
    """
    blocks = _BLOCK.findall(text)
    if not blocks:
        blocks = [re.sub(r"^\s*(\[TOOL_CALLS\]|<\|python_tag\|>)", "", text)]
    try:
        calls = [_call(value) for block in blocks for value in _json_values(block)]
    except (ValueError, RecursionError):
        return None
    return calls or None


def same_calls(found: Sequence[Any] | None, expected: Sequence[Any]) -> bool:
    """Whether both hold the same calls, in any order; each call as any common form writes it."""
    if found is None or len(found) != len(expected):
        return False
    try:
        return sorted(map(_canonical, found)) == sorted(map(_canonical, expected))
    except (ValueError, RecursionError):
        return False


def same_final_answer(generated: str, reference: str) -> bool:
    """Whether both texts end in the same number, or the same expression where it is no number."""
    expected = final_answer(reference)
    if expected is None:
        return generated.strip() == reference.strip()
    number = _whole_number(expected)
    if number is None:
        found = final_answer(generated)
        return found is not None and _plain(found) == _plain(expected)
    marked = _FINAL.findall(generated)
    numbers = _NUMBER.findall(marked[-1]) if marked else _NUMBER.findall(generated)[-1:]
    return bool(numbers) and _decimal(numbers[0]) == number


def final_answer(text: str) -> str | None:
    """What stands after the last `####` or "the answer is", else the last number, else None."""
    marked = _FINAL.findall(text)
    if marked:
        return str(marked[-1]).strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _json_values(text: str) -> list[Any]:
    decoder = json.JSONDecoder()
    values: list[Any] = []
    position = _skip(text, 0)
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        values.extend(value if isinstance(value, list) else [value])
        position = _skip(text, position)
    return values


def _skip(text: str, position: int) -> int:
    match = _SEPARATOR.match(text, position)
    return match.end() if match else position


def _call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("not a tool call")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments are not an object")
    return {"name": function["name"], "arguments": arguments}


def _canonical(value: Any) -> str:
    return json.dumps(_whole_floats_as_ints(_call(value)), sort_keys=True)


def _whole_floats_as_ints(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole_floats_as_ints(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_floats_as_ints(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _whole_number(text: str) -> Decimal | None:
    bare = _plain(text).lstrip("$").rstrip("%")
    return _decimal(bare) if _NUMBER.fullmatch(bare) else None


def _plain(text: str) -> str:
    return text.replace(" ", "").strip("$").rstrip(".")


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
