"""Small Python functions, each run on its examples when it is made."""

from __future__ import annotations

import json
from typing import Any

from .draw import Draw

# What is done to one item: (name, words, expression in x, on what)
_ITEMS = (
    ("squares", "the square of each number", "x * x"),
    ("doubles", "twice each number", "2 * x"),
    ("halves", "each number divided by two, rounded down", "x // 2"),
    ("negatives", "each number with its sign changed", "-x"),
    ("magnitudes", "the absolute value of each number", "abs(x)"),
    ("last_digits", "the last digit of each number", "abs(x) % 10"),
    ("shifted", "each number plus {k}", "x + {k}"),
    ("scaled", "each number times {k}", "x * {k}"),
    ("remainders", "the remainder of each number divided by {k}", "x % {k}"),
    ("capped", "each number, but no more than {k}", "min(x, {k})"),
)
_TESTS = (
    ("positive", "are positive", "x > 0"),
    ("even", "are even", "x % 2 == 0"),
    ("odd", "are odd", "x % 2 == 1"),
    ("above", "are greater than {k}", "x > {k}"),
    ("below", "are less than {k}", "x < {k}"),
    ("divisible", "are divisible by {k}", "x % {k} == 0"),
    ("any", "", ""),
)
_ENDS = (
    ("list", "a list of {what}", "[{item} for x in numbers{test}]"),
    ("sum", "the sum of {what}", "sum({item} for x in numbers{test})"),
    (
        "largest",
        "the largest of {what}, or 0 if there is none",
        "max(({item} for x in numbers{test}), default=0)",
    ),
    (
        "smallest",
        "the smallest of {what}, or 0 if there is none",
        "min(({item} for x in numbers{test}), default=0)",
    ),
    (
        "distinct",
        "how many different values there are among {what}",
        "len({{{item} for x in numbers{test}}})",
    ),
    ("sorted", "{what} in ascending order, as a list", "sorted({item} for x in numbers{test})"),
)
_REQUESTS = (
    "Write a Python function `{name}(numbers)` that returns {what}.",
    "I need a function `{name}(numbers)` in Python. It should return {what}.",
    "Please write `{name}(numbers)`: given a list of integers it returns {what}.",
)


def code_rows(count: int, split: str) -> list[dict[str, Any]]:
    """`count` different requests, each with a function and examples that it was run on."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    attempt = 0
    while len(rows) < count:
        draw = Draw("code", split, attempt)
        attempt += 1
        name, what, body = _compose(draw)
        request = draw.choice(_REQUESTS).format(name=name, what=what)
        if what in seen:
            continue
        seen.add(what)
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


def _compose(draw: Draw) -> tuple[str, str, str]:
    item, test, end = draw.choice(_ITEMS), draw.choice(_TESTS), draw.choice(_ENDS)
    factor, limit = draw.integer(2, 12), draw.integer(2, 12)
    words = item[1].format(k=factor)
    if test[1]:
        words = words.replace("each number", "each of the numbers that " + test[1].format(k=limit))
    condition = f" if {test[2].format(k=limit)}" if test[2] else ""
    body = end[2].format(item=item[2].format(k=factor), test=condition)
    parts = [end[0], item[0]] + ([test[0]] if test[1] else [])
    return "_".join(parts), end[1].format(what=words), body


def _run(source: str, name: str, draw: Draw) -> list[list[Any]]:
    """[input, output] pairs, by running the function; it is ours, not a model's."""
    space: dict[str, Any] = {}
    exec(source, space)
    inputs: list[list[int]] = [[], [draw.integer(-20, 20) for _ in range(6)]]
    inputs.append([draw.integer(-50, 50) for _ in range(4)])
    return [[numbers, space[name](list(numbers))] for numbers in inputs]
