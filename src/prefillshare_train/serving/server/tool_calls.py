"""Tool calls in a decoder's answer, read while it is generated.

A call is given on when its block is complete and holds what a call must: a block that is cut off
or malformed is text, in a stream as in a whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from prefillshare_train.data import parse_tool_calls

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# How answers begin that are calls as a whole: JSON, or a tag of Mistral's or Llama's before it.
_WHOLE = ("{", "[", "<|python_tag|>")


@dataclass(frozen=True, slots=True)
class Call:
    """A call: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


Piece = str | Call


class ToolCallParser:
    """Takes an answer apart into text and calls.

    The pieces of all `feed`s and of `finish` are the same however the answer was cut up, but for
    how its text is. White space around calls is no part of the text.

    Args:
        names: of the tools that were offered. An answer that is JSON as a whole is a call only
            where it names one of them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._state: Literal["start", "text", "block", "whole"] = "start"
        self._pending = ""
        # White space before the block that is being read: text again where that is no call.
        self._gap = ""
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """What is certain now that `text` has come too."""
        self._pending += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._begin()
        while self._state == "text" or (self._state == "block" and _CLOSE in self._pending):
            if self._state == "block":
                block, _, self._pending = self._pending.partition(_CLOSE)
                pieces += self._block(block, _CLOSE)
            elif not self._text(pieces):
                break
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when the answer has ended."""
        rest, self._pending = self._pending, ""
        if self._state == "block":
            return self._block(rest, "")
        if self._state == "whole" and _OPEN not in rest:
            calls = parse_tool_calls(rest)
            if calls and all(call["name"] in self._names for call in calls):
                return _calls(calls)
        elif self._state == "whole":
            self._state = "text"
            return [*self.feed(rest), *self.finish()]
        if self._after_call:
            rest = rest.strip()
        return [rest] if rest else []

    def _begin(self) -> None:
        start = self._pending.lstrip()
        if not start or any(tag.startswith(start) and tag != start for tag in _WHOLE):
            return
        self._state = "whole" if start.startswith(_WHOLE) else "text"

    def _text(self, pieces: list[Piece]) -> bool:
        """Give out text up to a block, or all that is certain. Returns whether a block begins."""
        if self._after_call:
            self._pending = self._pending.lstrip()
        before, opening, after = self._pending.partition(_OPEN)
        if opening:
            text = before.rstrip()
            self._gap = before[len(text) :]
            self._pending = after
            self._state = "block"
        else:
            certain = _certain(before)
            text, self._pending = before[:certain], before[certain:]
        if text:
            pieces.append(text)
            self._after_call = False
        return bool(opening)

    def _block(self, block: str, closing: str) -> list[Piece]:
        self._state = "text"
        calls = parse_tool_calls(f"{_OPEN}{block}{_CLOSE}")
        if calls and all(_encodes(str(call["name"])) for call in calls):
            self._after_call = True
            return _calls(calls)
        self._after_call = False
        return [f"{self._gap}{_OPEN}{block}{closing}"]


def _calls(calls: list[dict[str, object]]) -> list[Piece]:
    return [Call(str(call["name"]), _json(call["arguments"])) for call in calls]


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if _encodes(text) else json.dumps(value)


def _encodes(text: str) -> bool:
    """Not where it holds half a surrogate pair: JSON can escape one, UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _certain(text: str) -> int:
    """How much of a text stays text whatever follows: not what may begin a block."""
    end = len(text)
    for size in range(min(end, len(_OPEN) - 1), 0, -1):
        if _OPEN.startswith(text[end - size :]):
            end -= size
            break
    return len(text[:end].rstrip())
