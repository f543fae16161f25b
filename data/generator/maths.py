"""Short word problems with worked steps; the answer is also computed another way."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from . import values as v
from .draw import Draw, first_draw

Problem = tuple[str, list[str], int, Fraction]
_GOODS = ("apples", "pencils", "stamps", "buttons", "cards", "tickets", "candles", "marbles")
_UNITS = ("boxes", "bags", "crates", "packets", "baskets", "trays")


def math_rows(count: int, split: str, seed: int) -> list[dict[str, Any]]:
    """`count` different problems. `answer` is computed apart from the steps."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    attempt = first_draw(seed)
    while len(rows) < count:
        draw = Draw("maths", split, attempt)
        attempt += 1
        question, steps, answer, check = draw.choice(_KINDS)(draw)
        if Fraction(answer) != check:
            raise ValueError(f"{question} has two answers: {answer} and {check}")
        if question in seen:
            continue
        seen.add(question)
        text = "\n".join([*steps, f"#### {answer}"])
        rows.append(
            {
                "id": f"maths-{split}-{len(rows)}",
                "answer": str(check),
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": text},
                ],
            }
        )
    return rows


def _name(draw: Draw) -> str:
    return v.person(draw).split()[0]


def _packed(draw: Draw) -> Problem:
    who, goods, unit = _name(draw), draw.choice(_GOODS), draw.choice(_UNITS)
    units, each, gone = draw.integer(3, 19), draw.integer(4, 25), 0
    total = units * each
    gone = draw.integer(2, total - 1)
    question = draw.choice(
        (
            f"{who} has {units} {unit} with {each} {goods} in each. {who} gives away {gone} "
            f"{goods}. How many {goods} are left?",
            f"There are {each} {goods} in each of {who}'s {units} {unit}. After selling {gone} of "
            f"them, how many {goods} does {who} still have?",
        )
    )
    steps = [
        f"{who} has {units} * {each} = {total} {goods}.",
        f"{total} - {gone} = {total - gone} are left.",
    ]
    return question, steps, total - gone, Fraction(units) * each - gone


def _shopping(draw: Draw) -> Problem:
    who, goods = _name(draw), draw.choice(_GOODS)
    number, price, paid = draw.integer(2, 12), draw.integer(2, 15), 0
    cost = number * price
    paid = cost + draw.integer(1, 40)
    question = (
        f"{who} buys {number} {goods} at ${price} each and pays with ${paid}. "
        f"How many dollars of change does {who} get?"
    )
    steps = [
        f"The {goods} cost {number} * {price} = ${cost}.",
        f"The change is {paid} - {cost} = ${paid - cost}.",
    ]
    return question, steps, paid - cost, Fraction(paid) - sum([price] * number)


def _sharing(draw: Draw) -> Problem:
    who, goods = _name(draw), draw.choice(_GOODS)
    friends, each, kept = draw.integer(2, 12), draw.integer(2, 20), draw.integer(1, 30)
    total = friends * each + kept
    question = (
        f"{who} has {total} {goods}, keeps {kept} of them and shares the rest equally among "
        f"{friends} friends. How many {goods} does each friend get?"
    )
    steps = [
        f"{total} - {kept} = {total - kept} {goods} are shared.",
        f"Each friend gets {total - kept} / {friends} = {each}.",
    ]
    return question, steps, each, Fraction(total - kept, friends)


def _journey(draw: Draw) -> Problem:
    who = _name(draw)
    speed, hours, more = draw.integer(8, 90), draw.integer(2, 7), draw.integer(5, 120)
    first = speed * hours
    question = (
        f"{who} travels {hours} hours at {speed} km per hour and then another {more} km. "
        "How many km is that in all?"
    )
    steps = [
        f"The first part is {hours} * {speed} = {first} km.",
        f"In all it is {first} + {more} = {first + more} km.",
    ]
    return question, steps, first + more, Fraction(first, 1) + more


def _saving(draw: Draw) -> Problem:
    who = _name(draw)
    weekly, weeks, percent = draw.integer(2, 20) * 5, draw.integer(3, 12), draw.choice((10, 20, 40))
    total = weekly * weeks
    spent = total * percent // 100
    question = (
        f"{who} saves ${weekly} a week for {weeks} weeks and spends {percent}% of it. "
        "How many dollars are left?"
    )
    steps = [
        f"{who} saves {weekly} * {weeks} = ${total}.",
        f"{percent}% of {total} is ${spent}.",
        f"{total} - {spent} = ${total - spent} are left.",
    ]
    if total * percent % 100:
        return _saving(draw)
    return question, steps, total - spent, Fraction(total * (100 - percent), 100)


def _ages(draw: Draw) -> Problem:
    older, younger = _name(draw), _name(draw)
    if older == younger:
        return _ages(draw)
    age, times, years = draw.integer(3, 15), draw.integer(2, 5), draw.integer(2, 12)
    question = (
        f"{older} is {times} times as old as {younger}, who is {age}. How old will {older} be in "
        f"{years} years?"
    )
    now = age * times
    steps = [
        f"{older} is {times} * {age} = {now} now.",
        f"In {years} years {older} will be {now} + {years} = {now + years}.",
    ]
    return question, steps, now + years, Fraction(age) * times + years


_KINDS: tuple[Callable[[Draw], Problem], ...] = (
    _packed,
    _shopping,
    _sharing,
    _journey,
    _saving,
    _ages,
)
