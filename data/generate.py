"""Write the sample set: `python data/generate.py [--out DIR] [--seed N] [--check]`.

Every byte follows from the code and the seed, so `--check` can compare what is committed with a
fresh run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from generator.card import card
from generator.code import code_rows
from generator.maths import math_rows
from generator.tool_rows import tool_rows
from generator.tools import all_tools

COUNTS = {"tool_calling": (2400, 300), "math": (1500, 200), "code": (800, 150)}
_SHARD_BYTES = 900_000


def make(seed: int) -> dict[str, str]:
    """Every file of the sample set: relative path and text.

    A seed draws other rows from the same tools and patterns, with the same tools held out.
    """
    tools = all_tools()
    train_tools = [tool for tool in tools if not tool.heldout]
    held_tools = [tool for tool in tools if tool.heldout]
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, (split, pool) in enumerate((("train", train_tools), ("heldout", held_tools))):
        rows[f"tool_calling/{split}"] = tool_rows(pool, COUNTS["tool_calling"][number], split, seed)
    for task, build in (("math", math_rows), ("code", code_rows)):
        train_count, held_count = COUNTS[task]
        # One stream, cut in two: no question appears twice.
        both = build(train_count + held_count, "all", seed)
        rows[f"{task}/train"], rows[f"{task}/heldout"] = both[:train_count], both[train_count:]
    files: dict[str, str] = {}
    for name, part in rows.items():
        files.update(_shards(name, part))
    counts = {name: len(part) for name, part in rows.items()}
    files["README.md"] = card(
        counts, _offered(rows["tool_calling/train"]), _offered(rows["tool_calling/heldout"]), seed
    )
    return files


def _offered(rows: list[dict[str, Any]]) -> int:
    """How many different tools the rows offer."""
    return len({tool["function"]["name"] for row in rows for tool in row["tools"]})


def _shards(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """A split as one file, or as several where it is large."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    shards: list[list[str]] = [[]]
    size = 0
    for line in lines:
        if size + len(line.encode()) > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(line)
        size += len(line.encode())
    if len(shards) == 1:
        return {f"{name}.jsonl": "".join(lines)}
    return {f"{name}-{i:02d}.jsonl": "".join(shard) for i, shard in enumerate(shards)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "samples")
    parser.add_argument("--seed", type=int, default=0, help="of the rows; 0 made what is here")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    files = make(arguments.seed)
    if arguments.check:
        found = {
            p.relative_to(arguments.out).as_posix(): p.read_bytes()
            for p in arguments.out.rglob("*")
            if p.is_file()
        }
        expected = {name: text.encode() for name, text in files.items()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                print(f"{arguments.out / name} differs from what this program makes")
                return 1
        return 0
    for name, text in files.items():
        path = arguments.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
