"""Traces of requests: a JSON object a line, recorded from a load and replayed as one.

Keys: `session` (text), `at_s` (seconds from the start of the trace at which the request was sent),
`decoder`, `max_tokens`, and the whole prompt as `prompt_ids` (token ids) or `messages` (chat
messages). A replayed request is sent no earlier than it was, and not before the session's previous
one has ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare_train.workloads.driver import LoadResult
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.files import write_text
from prefillshare_train.workloads.sessions import Session, Turn


@dataclass(frozen=True, slots=True)
class _Row:
    session: str
    at_s: float
    turn: Turn


def write_trace(path: Path, result: LoadResult) -> None:
    """Record a load's requests: complete or not at all.

    Raises:
        WorkloadError: a prompt was sent as messages, so that its token ids are not known.
    """
    lines = []
    pairs = zip(result.requests, result.sent, strict=True)
    for request, sent in sorted(pairs, key=lambda pair: pair[0].start_s):
        if not sent.prompt_ids:
            raise WorkloadError("a load of chat messages is not recorded: it came from a trace")
        row = {
            "session": request.session,
            "at_s": round(request.start_s, 6),
            "decoder": request.decoder,
            "max_tokens": sent.completion_tokens,
            "prompt_ids": list(sent.prompt_ids),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_trace(path: Path, decoders: tuple[str, ...], *, speed: float = 1.0) -> list[Session]:
    """Sessions of a trace, in order of arrival.

    Args:
        decoders: names that are served.
        speed: 2 replays twice as fast as recorded.

    Raises:
        WorkloadError: the file is empty, a line is not as described, or names a decoder that is
            not served; the message names the line.
    """
    if speed <= 0:
        raise WorkloadError(f"speed must be above 0, found {speed}")
    if not path.is_file():
        raise WorkloadError(f"{path}: there is no such trace")
    sessions: dict[str, list[_Row]] = {}
    for row in _rows(path, decoders):
        sessions.setdefault(row.session, []).append(row)
    if not sessions:
        raise WorkloadError(f"{path} holds no requests")
    found = []
    for name, rows in sessions.items():
        rows.sort(key=lambda row: row.at_s)
        start = rows[0].at_s
        turns = tuple(
            Turn(
                row.turn.decoder,
                row.turn.prompt,
                row.turn.max_tokens,
                messages=row.turn.messages,
                not_before_s=(row.at_s - start) / speed,
            )
            for row in rows
        )
        found.append(Session(name, turns, start / speed))
    return sorted(found, key=lambda session: session.at_s)


def _rows(path: Path, decoders: tuple[str, ...]) -> Iterator[_Row]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise WorkloadError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise WorkloadError(f"{where}: expected an object, found {type(row).__name__}")
            yield _row(row, where, decoders)


def _row(row: dict[str, Any], where: str, decoders: tuple[str, ...]) -> _Row:
    ids, messages = row.get("prompt_ids"), row.get("messages")
    checks = {
        "session": isinstance(row.get("session"), str),
        "at_s": _is_number(row.get("at_s")) and row["at_s"] >= 0,
        "decoder": isinstance(row.get("decoder"), str),
        "max_tokens": _is_count(row.get("max_tokens")) and row["max_tokens"] >= 1,
        "prompt_ids": ids is None or (_is_list(ids) and all(map(_is_count, ids))),
        "messages": messages is None
        or (_is_list(messages) and all(isinstance(m, dict) for m in messages)),
    }
    for key, holds in checks.items():
        if not holds:
            raise WorkloadError(f"{where}: {key} is {row.get(key)!r:.80}; see the trace's format")
    if (ids is None) == (messages is None):
        raise WorkloadError(f"{where}: give either prompt_ids or messages")
    if row["decoder"] not in decoders:
        raise WorkloadError(
            f"{where}: decoder {row['decoder']!r} is not served; served are {', '.join(decoders)}"
        )
    prompt = () if ids is None else (tuple(ids),)
    chat = None if messages is None else tuple(messages)
    turn = Turn(row["decoder"], prompt, row["max_tokens"], messages=chat)
    return _Row(row["session"], float(row["at_s"]), turn)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)
