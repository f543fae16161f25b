"""Seal-Tools: a request, the calls that answer it, and a pool of API specifications."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from prefillshare_train.data.errors import DataError, RowError, shorten
from prefillshare_train.data.readers import read_file
from prefillshare_train.data.rows import Record, Row, make_row, text_of
from prefillshare_train.data.tool_schema import function_tool, type_schema


class SealTools:
    """Makes rows that offer the called tools among sampled distractors, in a random order.

    Which distractors a row gets, and in which order, depends on the seed and the row's place only.
    """

    def __init__(self, tools_file: Path, distractors: int, seed: int) -> None:
        """Read the pool.

        Raises:
            DataError: a specification is bad, or the pool has too few tools.
        """
        self._tools: dict[str, dict[str, Any]] = {}
        for record in read_file(tools_file):
            if isinstance(record, RowError):
                raise record
            name = text_of(record, "api_name")
            if name in self._tools:
                raise RowError(record.origin, f"tool {name!r} occurs twice", "Remove one")
            self._tools[name] = _tool(record, name)
        self._names = sorted(self._tools)
        self._file = tools_file
        self._distractors = distractors
        self._seed = seed
        if distractors >= len(self._names):
            raise DataError(
                f"distractors is {distractors}, but {tools_file} has only {len(self._names)} "
                "tools. Lower data distractors"
            )

    def row(self, record: Record) -> Row:
        """One row.

        Raises:
            RowError: it calls a tool that is not in the pool, or is malformed.
        """
        calling = record.values.get("calling")
        if not isinstance(calling, list) or not calling:
            raise RowError(
                record.origin,
                f"'calling' should be a list of one or more calls but is {shorten(calling)}",
                "Correct or remove the row",
            )
        calls = []
        for call in calling:
            name = call.get("api") if isinstance(call, dict) else None
            if name not in self._tools:
                raise RowError(
                    record.origin,
                    f"the called tool {name!r} is not in {self._file}",
                    "Name the tools_file that belongs to these rows",
                )
            calls.append({"name": name, "arguments": call.get("parameters")})
        messages = [
            {"role": "user", "content": text_of(record, "query")},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        return make_row(record, messages, self._offered(record, {call["name"] for call in calls}))

    def _offered(self, record: Record, called: set[str]) -> list[dict[str, Any]]:
        rng = random.Random(f"{self._seed}:{record.index}")
        # Drawing the called ones' number more leaves enough once those are taken out.
        size = min(self._distractors + len(called), len(self._names))
        drawn = [name for name in rng.sample(self._names, size) if name not in called]
        names = sorted(called) + drawn[: self._distractors]
        rng.shuffle(names)
        return [self._tools[name] for name in names]


def _tool(record: Record, name: str) -> dict[str, Any]:
    parameters = record.values.get("parameters")
    required = record.values.get("required", [])
    if not isinstance(parameters, dict) or not isinstance(required, list):
        raise RowError(
            record.origin,
            f"'parameters' should be an object and 'required' a list; found {shorten(parameters)}"
            f" and {shorten(required)}",
            "Name a Seal-Tools tool.jsonl as tools_file",
        )
    properties = {}
    for key, spec in parameters.items():
        if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
            raise RowError(
                record.origin, f"parameter {key!r} has no type: {shorten(spec)}", "Correct the tool"
            )
        schema = type_schema(spec["type"]) | {"description": str(spec.get("description", ""))}
        if "choices" in spec:
            schema["enum"] = spec["choices"]
        if "default" in spec:
            schema["default"] = spec["default"]
        if "unit" in spec:
            schema["description"] += f" (unit: {spec['unit']})"
        properties[key] = schema
    return function_tool(
        name, text_of(record, "api_description", default=""), properties, list(required)
    )
