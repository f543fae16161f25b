"""Conversations that call tools."""

from __future__ import annotations

import json
from typing import Any

from .draw import Draw, first_draw
from .tools import Request, ToolSpec, ask

NO_TOOL = "None of the available tools can do that."
_SHARES = {"single": 0.65, "parallel": 0.15, "none": 0.08, "turns": 0.12}
_OPENINGS = (
    ("", "."),
    ("Please ", "."),
    ("Could you ", "?"),
    ("Can you ", "?"),
    ("I need you to ", "."),
    ("I would like you to ", "."),
    ("Hi, please ", "."),
    ("Would you ", ", please?"),
    ("Now ", "."),
    ("For today: ", "."),
    ("Go ahead and ", "."),
)
_JOINS = (" and ", ", then ", " and also ")
_DONE = (
    "Done.",
    "That is done.",
    "It is done. Anything else?",
    "All set.",
    "The request went through.",
)


def tool_rows(tools: list[ToolSpec], count: int, split: str, seed: int) -> list[dict[str, Any]]:
    """`count` rows with different requests, all of whose tools come from `tools`."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    attempt = first_draw(seed)
    while len(rows) < count:
        draw = Draw("tool row", split, attempt)
        attempt += 1
        row = _row(tools, draw)
        text = row["messages"][0]["content"]
        if text not in seen:
            seen.add(text)
            rows.append({"id": f"tools-{split}-{len(rows)}", **row})
    return rows


def _row(tools: list[ToolSpec], draw: Draw) -> dict[str, Any]:
    kind = draw.weighted(_SHARES)
    gold = draw.choice(tools)
    if kind == "none":
        offered = [t for t in _neighbours(tools, gold, draw, 3) if t.name != gold.name]
        messages = [_user(ask(gold, draw), draw), {"role": "assistant", "content": NO_TOOL}]
        return {"messages": messages, "tools": [t.schema for t in draw.shuffled(offered)]}
    calls = [ask(gold, draw)]
    wanted = [gold]
    if kind in ("parallel", "turns"):
        near = [t for t in tools if t.domain == gold.domain and t.name != gold.name]
        second = gold if kind == "parallel" and draw.chance(0.3) else draw.choice(near)
        calls.append(ask(second, draw))
        wanted.append(second)
    offered = _neighbours(tools, gold, draw, draw.integer(1, 3))
    names = {t.name for t in offered} | {t.name for t in wanted}
    schemas = [t.schema for t in draw.shuffled([t for t in tools if t.name in names])]
    if kind == "turns":
        messages = [
            _user(calls[0], draw),
            _assistant(calls[:1]),
            _result(calls[0], draw),
            {"role": "assistant", "content": draw.choice(_DONE)},
            _user(calls[1], draw),
            _assistant(calls[1:]),
        ]
    else:
        messages = [_user_of([c.text for c in calls], draw), _assistant(calls)]
    return {"messages": messages, "tools": schemas}


def _neighbours(tools: list[ToolSpec], gold: ToolSpec, draw: Draw, count: int) -> list[ToolSpec]:
    """Distractors: mostly of the same field, so that names alone do not give the call away."""
    near = [t for t in tools if t.domain == gold.domain and t.name != gold.name]
    far = [t for t in tools if t.domain != gold.domain]
    close = min(count - (1 if draw.chance(0.4) else 0), len(near))
    picked = draw.sample(near, max(close, 0))
    return picked + draw.sample(far, count - len(picked))


def _user(request: Request, draw: Draw) -> dict[str, Any]:
    return _user_of([request.text], draw)


def _user_of(texts: list[str], draw: Draw) -> dict[str, Any]:
    opening, end = draw.choice(_OPENINGS)
    said = opening + draw.choice(_JOINS).join(texts)
    return {"role": "user", "content": said[0].upper() + said[1:] + end}


def _assistant(calls: list[Request]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in calls
        ],
    }


def _result(call: Request, draw: Draw) -> dict[str, Any]:
    content = json.dumps({"ok": True, "reference": draw.integer(1000, 9999)})
    return {"role": "tool", "name": call.name, "content": content}
