"""From parameter lists with Python type names to JSON-schema function tools."""

from __future__ import annotations

import re
from typing import Any

_SIMPLE = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "dict": "object",
    "object": "object",
}
_ARRAYS = ("list", "tuple", "set", "array", "sequence")


def type_schema(type_name: str) -> dict[str, Any]:
    """The JSON schema of a Python type name such as `int` or `List[str]`; `{}` where unknown."""
    text = type_name.strip().lower()
    optional = re.fullmatch(r"optional\[(.*)\]", text)
    if optional:
        text = optional[1]
    head, _, inner = text.partition("[")
    head = head.strip()
    if head in _SIMPLE:
        return {"type": _SIMPLE[head]}
    if head in _ARRAYS:
        items = type_schema(inner.removesuffix("]")) if inner else {}
        return {"type": "array", "items": items} if items else {"type": "array"}
    return {}


def function_tool(
    name: str, description: str, properties: dict[str, dict[str, Any]], required: list[str]
) -> dict[str, Any]:
    """A tool in the form that chat templates and OpenAI-compatible servers take."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
