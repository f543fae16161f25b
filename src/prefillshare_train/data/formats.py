"""The general row formats, and which format a row has by its columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefillshare_train.data.errors import DataError, RowError, shorten
from prefillshare_train.data.rows import (
    REASONING,
    Message,
    Record,
    Row,
    make_row,
    normalise_messages,
    parse_json,
    text_of,
)

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}

# In the order of the test: a more particular set of columns before one that it contains.
_COLUMNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("xlam", frozenset({"query", "tools", "answers"})),
    ("seal_tools", frozenset({"query", "calling"})),
    ("metamath", frozenset({"query", "response"})),
    ("gsm8k", frozenset({"question", "answer"})),
    ("mbpp", frozenset({"prompt", "solution", "entry_point"})),
    ("prompt_completion", frozenset({"prompt", "completion"})),
    ("alpaca", frozenset({"instruction", "output"})),
)


def detect_format(columns: Iterable[str], origin: str) -> str:
    """Name of the format that has these columns.

    Raises:
        DataError: none has.
    """
    present = set(columns)
    for name, needed in _COLUMNS:
        if needed <= present:
            return name
    known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, needed in _COLUMNS)
    raise DataError(
        f"{origin}: no known format has the columns {', '.join(sorted(present)) or 'none'}. Known "
        f"are: {known}. Set format, or rename columns with the source's columns"
    )


def with_system(record: Record, conversation: list[Message]) -> list[Message]:
    """Normal messages after the row's `system` column, where it has one.

    Raises:
        RowError: they begin with another system message.
    """
    system = text_of(record, "system", default="")
    if not system.strip():
        return conversation
    first = conversation[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *conversation]
    if first["content"] != system:
        raise RowError(
            record.origin,
            f"'system' is {shorten(system)}, but the conversation begins with another system "
            f"message: {shorten(first['content'])}",
            "Keep the one that is meant",
        )
    return conversation


def earlier_turns(record: Record) -> list[Message]:
    """The pairs of question and answer in `history`, as messages; none where it is absent.

    Raises:
        RowError: it is no list of pairs of texts.
    """
    history = parse_json(record.values.get("history") or [], "'history'", record.origin)
    if not isinstance(history, list):
        raise RowError(
            record.origin, f"'history' is not a list: {shorten(history)}", "Give a list of pairs"
        )
    turns: list[Message] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(
                record.origin,
                f"item {number} of 'history' is no pair of texts: {shorten(pair)}",
                "Give [question, answer]",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def messages(record: Record) -> Row:
    """`messages`, and `system` and `tools` where there are some."""
    if "messages" not in record.values:
        text_of(record, "messages")
    conversation = normalise_messages(record.values["messages"], record.origin)
    return make_row(record, with_system(record, conversation), record.values.get("tools"))


def prompt_completion(record: Record) -> Row:
    """`prompt` and `completion`, each a string or a list of messages; `system` and `tools`.

    Assistant messages inside the prompt are context and not trained.
    """
    prompt = record.values.get("prompt")
    completion = record.values.get("completion")
    if isinstance(prompt, list):
        before = normalise_messages(_unweighted(prompt), record.origin)
    else:
        before = [{"role": "user", "content": text_of(record, "prompt")}]
    if isinstance(completion, list):
        after = normalise_messages(completion, record.origin)
    else:
        after = [{"role": "assistant", "content": text_of(record, "completion")}]
    return make_row(record, with_system(record, before) + after, record.values.get("tools"))


def _unweighted(prompt: list[Any]) -> list[Any]:
    return [
        item | {"weight": 0} if isinstance(item, dict) and item.get("role") == "assistant" else item
        for item in prompt
    ]


def alpaca(record: Record) -> Row:
    """`instruction`, `input` (may be absent or empty) and `output`; `system` and `history`.

    The answers in `history` are trained like any other.
    """
    instruction = text_of(record, "instruction")
    further = text_of(record, "input", default="")
    content = f"{instruction}\n\n{further}" if further.strip() else instruction
    conversation = [
        *earlier_turns(record),
        {"role": "user", "content": content},
        {"role": "assistant", "content": text_of(record, "output")},
    ]
    return make_row(record, with_system(record, conversation))


def sharegpt(record: Record) -> Row:
    """`conversations` of `from` and `value`; `system` and `tools` where there are some."""
    conversations = record.values.get("conversations")
    if not isinstance(conversations, list):
        raise RowError(
            record.origin,
            f"'conversations' should be a list but is {shorten(conversations)}",
            "Give a list of {from, value} objects",
        )
    converted = [
        _sharegpt_message(item, number, record.origin)
        for number, item in enumerate(conversations, start=1)
    ]
    normal = normalise_messages(converted, record.origin)
    return make_row(record, with_system(record, normal), record.values.get("tools"))


def _sharegpt_message(item: Any, number: int, origin: str) -> Any:
    # Some sets of this name hold role and content, which are already the normal form.
    if not isinstance(item, dict) or ("from" not in item and "role" in item):
        return item
    sender = item.get("from")
    if sender not in _SHAREGPT_ROLES:
        raise RowError(
            origin,
            f"message {number} is from {sender!r}, which is no known role",
            f"Use one of {', '.join(_SHAREGPT_ROLES)}",
        )
    message: dict[str, Any] = {"role": _SHAREGPT_ROLES[sender], "content": item.get("value")}
    if sender in ("function_call", "tool_call"):
        message = {"role": "assistant", "content": "", "tool_calls": item.get("value")}
    else:
        message |= {key: item[key] for key in ("tool_calls", "function_call") if key in item}
    if message["content"] is None:
        raise RowError(origin, f"message {number} has no value", "Correct or remove the row")
    return message | {key: item[key] for key in ("weight", *REASONING) if key in item}
