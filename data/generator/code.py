"""Small Python functions, each run on its examples when it is made."""

from __future__ import annotations

import json
from typing import Any

from .draw import Draw, first_draw

# What is done to one number x: (name, words, expression)
_ITEMS = (
    ("squares", "the square of x", "x * x"),
    ("doubles", "twice x", "2 * x"),
    ("halves", "half of x (rounded down)", "x // 2"),
    ("negatives", "x with its sign changed", "-x"),
    ("magnitudes", "the absolute value of x", "abs(x)"),
    ("last_digits", "the last digit of x", "abs(x) % 10"),
    ("shifted", "x plus {k}", "x + {k}"),
    ("scaled", "x times {k}", "x * {k}"),
    ("remainders", "x modulo {k}", "x % {k}"),
    ("capped", "the smaller of x and {k}", "min(x, {k})"),
)
_TESTS = (
    ("positive", " that is positive", "x > 0"),
    ("even", " that is even", "x % 2 == 0"),
    ("odd", " that is odd", "x % 2 == 1"),
    ("above", " that is greater than {k}", "x > {k}"),
    ("below", " that is less than {k}", "x < {k}"),
    ("divisible", " that is divisible by {k}", "x % {k} == 0"),
    ("any", "", ""),
)
_ENDS = (
    ("list", "these values as a list", "[{item} for x in numbers{test}]"),
    ("sum", "the sum of these values", "sum({item} for x in numbers{test})"),
    (
        "largest",
        "the largest of these values, or 0 if there are none",
        "max(({item} for x in numbers{test}), default=0)",
    ),
    (
        "smallest",
        "the smallest of these values, or 0 if there are none",
        "min(({item} for x in numbers{test}), default=0)",
    ),
    (
        "distinct",
        "how many different values that gives",
        "len({{{item} for x in numbers{test}}})",
    ),
    (
        "sorted",
        "these values as a list in ascending order",
        "sorted({item} for x in numbers{test})",
    ),
)
# The choice of numbers, the operation and the result stand in clauses of their own: run together
# ("those greater than 5 plus 3"), the words would fit two functions.
_REQUESTS = (
    "Write a Python function `{name}(numbers)`. For each integer x in the list{test}, compute "
    "{item}; return {end}.",
    "I need a function `{name}(numbers)` in Python. It takes every integer x in the list{test}, "
    "replaces it with {item} and returns {end}.",
    "Please write `{name}(numbers)`: given a list of integers, compute {item} for each number x "
    "in it{test}, and return {end}.",
    "In Python, define `{name}(numbers)` for a list of integers. Keep every x{test}, turn it into "
    "{item}, and give back {end}.",
)


def code_rows(count: int, split: str, seed: int) -> list[dict[str, Any]]:
    """`count` different requests, each with a function and examples that it was run on."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    attempt = first_draw(seed)
    while len(rows) < count:
        draw = Draw("code", split, attempt)
        attempt += 1
        name, words, body = _compose(draw)
        if body in seen:
            continue
        seen.add(body)
        request = draw.choice(_REQUESTS).format(name=name, **words)
        source = f"def {name}(numbers):\n    return {body}"
        rows.append(
            {
                "id": f"code-{split}-{len(rows)}",
                "entry_point": name,
                "examples": json.dumps(_run(source, name, draw)),
                "messages": [
                    {"role": "user", "content": request},
                    {"role": "assistant", "content": f"```python\n{source}\n```"},
                ],
            }
        )
    return rows


def _compose(draw: Draw) -> tuple[str, dict[str, str], str]:
    """Name of the function, the words of its request, and the expression it returns."""
    item, test, end = draw.choice(_ITEMS), draw.choice(_TESTS), draw.choice(_ENDS)
    factor, limit = draw.integer(2, 12), draw.integer(2, 12)
    words = {
        "item": item[1].format(k=factor),
        "test": test[1].format(k=limit),
        "end": end[1],
    }
    condition = f" if {test[2].format(k=limit)}" if test[2] else ""
    body = end[2].format(item=item[2].format(k=factor), test=condition)
    parts = [end[0], item[0]] + ([test[0]] if test[1] else [])
    return "_".join(parts), words, body


def _run(source: str, name: str, draw: Draw) -> list[list[Any]]:
    """[input, output] pairs, by running the function; it is ours, not a model's."""
    space: dict[str, Any] = {}
    exec(source, space)
    inputs: list[list[int]] = [[], [draw.integer(-20, 20) for _ in range(6)]]
    inputs.append([draw.integer(-50, 50) for _ in range(4)])
    return [[numbers, space[name](list(numbers))] for numbers in inputs]
