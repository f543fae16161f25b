"""The one normal form in which rows of every format leave their source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from prefillshare_train.data.errors import RowError, shorten

Scoring = Literal["text", "math", "tool_calls"]
Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which chat templates look for its reasoning."""
# What a call may hold beside its arguments. A key unknown here may be the arguments' own.
_CALL_KEYS = frozenset({"id", "index", "type", "name", "function"})


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row as it was read.

    Attributes:
        values: its columns.
        origin: `file:line`, or `file:row n` (from 1) where rows have no line of their own.
        index: its place in its source, from 0.
    """

    values: dict[str, Any]
    origin: str
    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation in the form that chat templates take.

    Attributes:
        messages: `role` and `content` (always a string), and where the row has them `tool_calls`
            (`{"type": "function", "function": {"name", "arguments"}}` with arguments as an object),
            `weight` (0 or 1) and what else the template may read, such as `REASONING`.
        tools: JSON-schema function tools, or None.
        origin: where the row lies, for errors.
        id: the source's own id, or `origin`.
        scoring: how a generated answer is compared with the row's.
    """

    messages: list[Message]
    tools: list[Tool] | None
    origin: str
    id: str
    scoring: Scoring = "text"


def make_row(
    record: Record,
    messages: Any,
    tools: Any = None,
    *,
    scoring: Scoring | None = None,
) -> Row:
    """Check and normalise messages and tools.

    Args:
        scoring: None decides by the last assistant message: `tool_calls` where it calls tools,
            else `text`.

    Raises:
        RowError: anything in it is not as `Row` says.
    """
    normal = normalise_messages(messages, record.origin)
    answers = [message for message in normal if message["role"] == "assistant"]
    if scoring is None:
        scoring = "tool_calls" if answers and answers[-1].get("tool_calls") else "text"
    identifier = record.values.get("id")
    return Row(
        messages=normal,
        tools=normalise_tools(tools, record.origin),
        origin=record.origin,
        id=record.origin if identifier is None else str(identifier),
        scoring=scoring,
    )


def text_of(record: Record, key: str, *, default: str | None = None) -> str:
    """The string in column `key`; `default` where it is absent or null and a default is given."""
    value = record.values.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, str):
        return value
    if key not in record.values:
        found = f"key {key!r} is missing; found {', '.join(map(repr, record.values)) or 'none'}"
        raise RowError(record.origin, found, "Name the right data format, or set columns")
    raise RowError(
        record.origin,
        f"{key!r} should be text but is {type(value).__name__}: {shorten(value)}",
        "Correct or remove the row",
    )


def parse_json(value: Any, what: str, origin: str) -> Any:
    """`value` itself, or what it holds where it is a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(
            origin, f"{what} is not valid JSON ({error}): {shorten(value)}", "Correct the row"
        ) from None


def normalise_messages(value: Any, origin: str) -> list[Message]:
    """Check and normalise a list of messages (see `Row`)."""
    value = parse_json(value, "messages", origin)
    if not isinstance(value, list) or not value:
        raise RowError(
            origin,
            f"messages should be a list of one or more but is {shorten(value)}",
            "Give a list of {role, content} objects",
        )
    return [_message(item, number, origin) for number, item in enumerate(value, start=1)]


def _message(value: Any, number: int, origin: str) -> Message:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise RowError(
            origin, f"{where} is not an object: {shorten(value)}", "Give {role, content} objects"
        )
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role == "function":
        role = message["role"] = "tool"
    if role not in ROLES:
        raise RowError(
            origin,
            f"{where} has the unknown role {role!r}"
            if role is not None
            else f"{where} has no role",
            f"Use one of {', '.join(ROLES)}",
        )
    message["content"] = _content(message.get("content", ""), where, origin)
    calls, legacy = message.pop("tool_calls", None), message.pop("function_call", None)
    if calls and legacy:
        raise RowError(
            origin, f"{where} has both tool_calls and function_call", "Keep the one that is meant"
        )
    calls = calls or legacy
    if calls:
        if role != "assistant":
            raise RowError(
                origin, f"{where} has tool_calls but its role is {role!r}", "Only assistants call"
            )
        message["tool_calls"] = normalise_calls(calls, where, origin)
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowError(origin, f"{where} has weight {weight!r}", "A weight is 0 or 1")
    blank = not message["content"].strip() and "tool_calls" not in message
    if role == "assistant" and blank and weight:
        raise RowError(
            origin,
            f"{where} is an assistant message without text or tool_calls",
            "Remove the row, or give the message weight: 0",
        )
    _check_characters(message, where, origin)
    return message


def _check_characters(value: Any, what: str, origin: str) -> None:
    """Tokenizers take UTF-8, which has no form for what JSON may write as `\\ud83d` alone."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError(
            origin,
            f"{what} holds half a surrogate pair, which is no character",
            "Correct or remove the row",
        ) from None


def _content(value: Any, where: str, origin: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RowError(
        origin,
        f"{where} has content that is not text: {shorten(value)}",
        "Only text, or a list of text parts, can be trained on",
    )


def normalise_calls(value: Any, where: str, origin: str) -> list[dict[str, Any]]:
    """Tool calls as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.

    Raises:
        RowError: they are not calls, or one holds what would be lost.
    """
    value = parse_json(value, f"{where}: tool_calls", origin)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(
            origin, f"{where}: tool_calls is not a list: {shorten(value)}", "Give a list of calls"
        )
    calls = []
    for item in value:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise RowError(
                origin,
                f"{where}: a tool call has no name: {shorten(item)}",
                'Give {"function": {"name": ..., "arguments": {...}}}',
            )
        call: dict[str, Any] = {"type": "function"}
        if item.get("id") is not None:
            call["id"] = item["id"]
        arguments = _arguments(item, function, where, origin)
        calls.append(call | {"function": {"name": function["name"], "arguments": arguments}})
    return calls


def _arguments(
    item: dict[str, Any], function: dict[str, Any], where: str, origin: str
) -> dict[str, Any]:
    """A call's `arguments`, or its `parameters` where those are absent."""
    what = f"{where}: the call of {function['name']}"
    given = {key: value for key, value in function.items() if value is not None}
    around = {} if function is item else item
    unread = [key for key in around if key not in _CALL_KEYS and around[key] is not None]
    unread += [key for key in given if key not in _CALL_KEYS | {"arguments", "parameters"}]
    if unread:
        raise RowError(
            origin,
            f"{what} has {', '.join(map(repr, unread))}, where nothing is read",
            "Give its arguments as 'arguments' beside its name, and remove what is no part of it",
        )
    if "arguments" in given and "parameters" in given:
        raise RowError(origin, f"{what} has both arguments and parameters", "Keep its arguments")
    arguments = given.get("arguments", given.get("parameters", {}))
    if arguments == "":
        arguments = {}
    arguments = parse_json(arguments, f"{where}: arguments of {function['name']}", origin)
    if not isinstance(arguments, dict):
        raise RowError(
            origin,
            f"{where}: arguments of {function['name']} are not an object: {shorten(arguments)}",
            "Give a JSON object, or a string that holds one",
        )
    return arguments


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def normalise_tools(value: Any, origin: str) -> list[Tool] | None:
    """Tools as `{"type": "function", "function": {...}}`; None where there are none."""
    value = parse_json(value, "tools", origin) if value else None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(origin, f"tools is not a list: {shorten(value)}", "Give a list of tools")
    tools = []
    for number, item in enumerate(value, start=1):
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise RowError(
                origin,
                f"a tool has no name: {shorten(item)}",
                'Give {"type": "function", "function": {"name": ..., "parameters": {...}}}',
            )
        _check_characters(function, f"tool {number}", origin)
        tools.append({"type": "function", "function": function})
    return tools
