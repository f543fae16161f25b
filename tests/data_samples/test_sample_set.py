"""The committed sample set: regenerable, valid, and its held-out tools unseen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.data.helpers import tiny_tokenizer

from prefillshare_train.data import DataConfig, SourceConfig, build_dataset

DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLES = DATA / "samples"
TASKS = ("tool_calling", "math", "code")
MONTHS = (
    "January February March April May June July August September October November December"
).split()


def rows(task: str, split: str) -> list[dict[str, Any]]:
    files = sorted((SAMPLES / task).glob(f"{split}*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        call["function"] for message in row["messages"] for call in message.get("tool_calls", [])
    ]


def tools(split: str) -> dict[str, Any]:
    return {
        tool["function"]["name"]: tool["function"]
        for row in rows("tool_calling", split)
        for tool in row["tools"]
    }


def test_a_fresh_run_gives_the_committed_bytes() -> None:
    command = [sys.executable, str(DATA / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_a_changed_byte(tmp_path: Path) -> None:
    make = [sys.executable, str(DATA / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(make, check=True)
    path = tmp_path / "code" / "heldout.jsonl"
    path.write_text(path.read_text().replace("numbers", "values", 1))
    assert subprocess.run([*make, "--check"], capture_output=True, check=False).returncode == 1


def test_a_seed_draws_other_rows_from_the_same_tools(tmp_path: Path) -> None:
    make = [sys.executable, str(DATA / "generate.py"), "--out", str(tmp_path), "--seed", "1"]
    subprocess.run(make, check=True)
    assert subprocess.run([*make, "--check"], check=False).returncode == 0
    for task in TASKS:
        other = [json.loads(s) for s in (tmp_path / task / "heldout.jsonl").open(encoding="utf-8")]
        ours = {row["messages"][0]["content"] for row in rows(task, "heldout")}
        again = sum(row["messages"][0]["content"] in ours for row in other)
        assert again < len(other) // 2, task
    held_out = [json.loads(s) for s in (tmp_path / "tool_calling" / "heldout.jsonl").open()]
    offered = {tool["function"]["name"] for row in held_out for tool in row["tools"]}
    assert not offered & tools("train").keys()


def test_the_card_gives_the_counts() -> None:
    card = (SAMPLES / "README.md").read_text()
    for task in TASKS:
        counts = f"| {task} | {len(rows(task, 'train'))} | {len(rows(task, 'heldout'))} |"
        assert counts in card
    said = re.search(r"(\d+) of them in training,\s+(\d+) others in the held-out", card)
    assert said is not None
    assert [int(n) for n in said.groups()] == [len(tools("train")), len(tools("heldout"))]


def test_no_file_is_large() -> None:
    sizes = [path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()]
    assert max(sizes) < 950_000
    assert sum(sizes) < 8_000_000


def test_there_is_enough_of_it() -> None:
    train = rows("tool_calling", "train")
    assert len(train) >= 2000
    assert len(rows("tool_calling", "heldout")) >= 200
    assert len(tools("train")) >= 400
    assert len(tools("heldout")) >= 100
    kinds = {len(calls(row)) for row in train}
    assert {0, 1, 2} <= kinds
    assert any(sum(m["role"] == "user" for m in row["messages"]) == 2 for row in train)


def test_held_out_tools_never_appear_in_training() -> None:
    assert not tools("train").keys() & tools("heldout").keys()


@pytest.mark.parametrize("task", TASKS)
def test_no_request_appears_twice(task: str) -> None:
    asked = [row["messages"][0]["content"] for s in ("train", "heldout") for row in rows(task, s)]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_call_fits_the_schema_of_an_offered_tool(split: str) -> None:
    for row in rows("tool_calling", split):
        offered = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        for call in calls(row):
            schema = offered[call["name"]]["parameters"]
            jsonschema.validate(call["arguments"], {**schema, "additionalProperties": False})


def _said(value: Any, text: str) -> bool:
    """Whether a value can be copied from a request; an ISO date may be spelled out there."""
    if isinstance(value, list):
        return all(_said(item, text) for item in value)
    shown = str(value)
    words = [shown, shown.replace("_", " ")]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", shown):
        day = date.fromisoformat(shown)
        words.append(f"{day.day} {MONTHS[day.month - 1]} {day.year}")
    bounded = (rf"(?<![\w.]){re.escape(word)}(?!\w|[.]\d)" for word in words)
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in bounded)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_value_is_said_in_its_request(split: str) -> None:
    for row in rows("tool_calling", split):
        request = ""
        for message in row["messages"]:
            if message["role"] == "user":
                request = message["content"]
            for call in message.get("tool_calls", []):
                for name, value in call["function"]["arguments"].items():
                    assert isinstance(value, bool) or _said(value, request), (request, name, value)


def test_the_package_loads_every_tool_row() -> None:
    source = str(SAMPLES / "tool_calling")
    config = DataConfig(
        train=SourceConfig(source=source, split="train"),
        eval=SourceConfig(source=source, split="heldout"),
        eval_max_rows=None,
        chat_template="chatml-tools",
        max_length=16_384,
    )
    data = build_dataset(config, tiny_tokenizer())
    assert len(data.train) == len(rows("tool_calling", "train"))
    assert len(data.eval_rows) == len(rows("tool_calling", "heldout"))
    answers = sum(
        message["role"] == "assistant"
        for row in rows("tool_calling", "heldout")
        for message in row["messages"]
    )
    assert len(data.eval_examples) == answers


def test_maths_answers_agree_with_the_separate_computation() -> None:
    for row in rows("math", "train") + rows("math", "heldout"):
        text = row["messages"][1]["content"]
        assert Fraction(text.rsplit("#### ", 1)[1]) == Fraction(row["answer"])
        for left, right in re.findall(r"(\d+ [-+*/] \d+) = \$?(\d+)", text):
            a, sign, b = left.split()
            value = {
                "+": Fraction(a) + Fraction(b),
                "-": Fraction(a) - Fraction(b),
                "*": Fraction(a) * Fraction(b),
                "/": Fraction(a) / Fraction(b),
            }[sign]
            assert value == Fraction(right), text


def test_code_answers_do_what_their_examples_say() -> None:
    chosen = rows("code", "heldout")[::3]
    program = ["import json"]
    for number, row in enumerate(chosen):
        source = row["messages"][1]["content"].removeprefix("```python\n").removesuffix("\n```")
        program += [
            source,
            f"for given, expected in json.loads({row['examples']!r}):",
            f"    assert {row['entry_point']}(given) == expected, {number}",
        ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(program)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
