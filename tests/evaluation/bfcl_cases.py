"""Made-up functions in BFCL's form, and answers that call them rightly and wrongly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.bfcl import Category, Style

TEA = {
    "name": "tea.order",
    "description": "Order tea.",
    "parameters": {
        "type": "dict",
        "properties": {
            "cups": {"type": "integer", "description": "How many."},
            "kind": {"type": "string", "description": "Which tea."},
            "heat": {"type": "float", "description": "Degrees Celsius."},
            "extras": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What goes with it.",
            },
            "address": {
                "type": "dict",
                "description": "Where to.",
                "properties": {
                    "street": {"type": "string", "description": "Its name."},
                    "number": {"type": "integer", "description": "Of the house."},
                },
            },
            "gift": {"type": "boolean", "description": "Wrap it.", "default": False},
        },
        "required": ["cups", "kind"],
    },
}
COFFEE = {
    "name": "coffee_order",
    "description": "Order coffee.",
    "parameters": {
        "type": "dict",
        "properties": {
            "cups": {"type": "integer", "description": "How many."},
            "range": {
                "type": "tuple",
                "items": {"type": "float"},
                "description": "Least and most.",
            },
            "note": {"type": "any", "description": "Anything."},
        },
        "required": ["cups"],
    },
}
TRUTH = {
    "tea.order": {
        "cups": [6],
        "kind": ["green", "green tea"],
        "heat": ["", 70.5],
        "extras": ["", ["lemon", "honey"]],
        "address": ["", {"street": ["Mill Lane"], "number": [4]}],
        "gift": ["", True],
    }
}
RIGHT = {"cups": 6, "kind": "Green Tea"}
FULL = {
    **RIGHT,
    "heat": 70.5,
    "extras": ["lemon", "honey"],
    "address": {"street": "mill lane", "number": 4},
    "gift": True,
}

Calls = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """An answer to "six cups of green tea", and what the verdict on it must be."""

    answer: Calls | str
    correct: bool
    detail: str = ""


BOTH = {
    "optional left out": Case([("tea.order", RIGHT)], True),
    "everything given": Case([("tea.order", FULL)], True),
    "float as an integer": Case([("tea.order", {**RIGHT, "heat": 70})], False, "Invalid value"),
    "wrong value": Case([("tea.order", {**RIGHT, "cups": 3})], False, "Invalid value"),
    "wrong type": Case([("tea.order", {**RIGHT, "cups": "6"})], False, "Incorrect type"),
    "integer as a float": Case([("tea.order", {**RIGHT, "cups": 6.0})], False, "Incorrect type"),
    "wrong type inside": Case(
        [("tea.order", {**RIGHT, "extras": ["lemon", 1]})], False, "Invalid value"
    ),
    "wrong order inside": Case(
        [("tea.order", {**RIGHT, "extras": ["honey", "lemon"]})], False, "Invalid value"
    ),
    "missing parameter": Case([("tea.order", {"cups": 6})], False, "Missing required"),
    "extra parameter": Case([("tea.order", {**RIGHT, "milk": 1})], False, "Unexpected parameter"),
    "wrong name": Case([("tea.brew", RIGHT)], False, "not found in model output"),
    "underscore for dot": Case([("tea_order", RIGHT)], False, "not found in model output"),
    "other function": Case([("coffee_order", {"cups": 6})], False, "not found in model output"),
    "the same call twice": Case([("tea.order", RIGHT)] * 2, False, "Wrong number"),
    "one call too many": Case(
        [("tea.order", RIGHT), ("coffee_order", {"cups": 1})], False, "Wrong number"
    ),
    "wrong value in a dict": Case(
        [("tea.order", {**RIGHT, "address": {"street": "Mill Lane", "number": 5}})], False, "number"
    ),
    "key missing in a dict": Case(
        [("tea.order", {**RIGHT, "address": {"street": "Mill Lane"}})], False, "number"
    ),
    "extra key in a dict": Case(
        [("tea.order", {**RIGHT, "address": {**FULL["address"], "town": "Ely"}})], False, "town"
    ),
    "null": Case([("tea.order", {**RIGHT, "heat": None})], False, "Incorrect type"),
}
CHAT = {
    "prose": Case("Six cups of green tea it is.", False, "No tool call"),
    "nothing": Case("", False, "No tool call"),
    "text around": Case(
        'Sure.\n<tool_call>\n{"name": "tea.order", "arguments": {"cups": 6, "kind": "green"}}\n'
        "</tool_call>",
        True,
    ),
    "no closing tag": Case(
        '<tool_call>{"name": "tea.order", "arguments": {"cups": 6, "kind": "green"}}', True
    ),
    "cut off": Case('<tool_call>{"name": "tea.order", "argum', False, "No tool call"),
    "python call": Case("[tea.order(cups=6, kind='green')]", False, "No tool call"),
    "lone surrogate": Case(
        '{"name": "tea.order", "arguments": {"cups": 6, "kind": "\\ud800"}}', False, "Invalid value"
    ),
    "surrogate as a key": Case(
        '{"name": "tea.order", "arguments": {"cups": 6, "kind": "green", "address": '
        '{"\\ud800": 1}}}',
        False,
        "Unexpected dict key",
    ),
    "deep": Case(
        '{"name": "tea.order", "arguments": {"cups": ' + "[" * 900 + "]" * 900 + "}}", False
    ),
    "huge number": Case(
        '{"name": "tea.order", "arguments": {"cups": ' + "9" * 5000 + "}}", False, "No tool call"
    ),
}
PROMPTING = {
    "prose": Case("Six cups of green tea it is.", False, "No calls could be decoded"),
    "nothing": Case("", False, "Wrong number"),
    "no brackets": Case("tea.order(cups=6, kind='green')", True),
    "fenced": Case("```\n[tea.order(cups=6, kind='green')]\n```", True),
    "positional": Case("[tea.order(6, 'green')]", False, "Missing required"),
    "half positional": Case("[tea.order(6, kind='green')]", False, "Missing required"),
    "arithmetic": Case("[tea.order(cups=2 * (4 - 1), kind='gre' + 'en')]", True),
    "wrong arithmetic": Case("[tea.order(cups=2 * 4, kind='green')]", False, "Invalid value"),
    "json": Case('{"name": "tea.order", "arguments": {"cups": 6}}', False, "No calls"),
    "tool call": Case('<tool_call>{"name": "tea.order"}</tool_call>', False, "No calls"),
    "cut off": Case("[tea.order(cups=6, kin", False, "No calls"),
    "not a call": Case("[6]", False, "No calls"),
    "variable": Case("[tea.order(cups=n + 1, kind='green')]", False, "not arithmetic"),
    "endless power": Case("[tea.order(cups=9 ** 9 ** 9, kind='green')]", False, "too large"),
    "memory eater": Case("[tea.order(cups=6, kind='g' * 10 ** 12)]", False, "too large"),
    "deep": Case("[tea.order(cups=" + "(" * 300 + ")" * 300 + ")]", False, "No calls"),
    "deep sum": Case("[tea.order(cups=" + "1+" * 3000 + "1, kind='green')]", False, "No calls"),
    "unhashable key": Case("[tea.order(cups={[1]: 2}, kind='green')]", False, "No calls"),
    "odd values": Case("[tea.order(cups={(1, 2): 3j}, kind=b'green')]", False),
}


def text_of(answer: Calls | str, style: Style) -> str:
    if isinstance(answer, str):
        return answer
    if style == "prompting":
        calls = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
            for name, arguments in answer
        ]
        return f"[{', '.join(calls)}]"
    blocks = [json.dumps({"name": name, "arguments": given}) for name, given in answer]
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)


def cases(style: Style) -> dict[str, Case]:
    return {**BOTH, **(CHAT if style == "chat_template" else PROMPTING)}


def write_data(folder: Path, category: Category, **changes: Any) -> Path:
    """One made-up entry and its answer in BFCL's files."""
    functions = [TEA] if category == "simple_python" else [COFFEE, TEA]
    entry = {
        "id": f"{category}_0",
        "question": [[{"role": "user", "content": "Six cups of green tea, please."}]],
        "function": functions,
        **changes,
    }
    answer = {"id": f"{category}_0", "ground_truth": [TRUTH]}
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    name = f"BFCL_v4_{category}.json"
    (folder / name).write_text(json.dumps(entry) + "\n")
    (folder / "possible_answer" / name).write_text(json.dumps(answer) + "\n")
    return folder
