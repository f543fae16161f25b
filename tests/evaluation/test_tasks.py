"""Benchmarks by name, and the command from its flags to its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.evaluation.task import EvaluationError
from prefillshare_train.evaluation.tasks import make_tasks


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions of GSM8K's form."""
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in (2, 3)
    ]
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", rows)
    return tmp_path


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval",
        *("--base", str(base)),
        *("--tasks", "gsm8k"),
        *("--data", str(data)),
        *("--out", str(out)),
        *("--dtype", "float32"),
        *("--max-new-tokens", "8"),
        *more,
    ]


def test_the_command_evaluates_the_base_alone_and_goes_on(tmp_path: Path, data: Path) -> None:
    base, out = tiny.save_base(tmp_path / "base"), tmp_path / "out"
    for limit in ("1", "2"):
        arguments = command(base, data, out, "--limit", limit)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        summary = json.loads((out / "summary.json").read_text())
        (row,) = summary["results"]
        assert row["n"] == int(limit)
        assert (row["decoder"], row["prefill"], row["sharing_ratio"]) == ("base", "self", 0.0)
    assert summary["tasks"]["gsm8k"]["settings"]["max_new_tokens"] == 8
    assert len((out / "outputs" / "gsm8k.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "gsm9k"], "gsm9k is not a benchmark here; known are gsm8k"),
        (["--tasks", ","], "nothing is not a benchmark here"),
        (["--sharing-ratio", "0,half"], "give numbers from 0 to 1"),
        (["--sharing-ratio", "2"], "must be from 0 to 1"),
        (["--decoder", "nowhere"], "there is no folder nowhere"),
        (["--max-new-tokens", "400"], "Lower --max-new-tokens"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, data: Path, more: list[str], message: str
) -> None:
    base = tiny.save_base(tmp_path / "base")
    result = CliRunner().invoke(app, command(base, data, tmp_path / "out", *more))
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_benchmark_named_twice_is_run_once(data: Path) -> None:
    assert [task.name for task in make_tasks(["gsm8k", " gsm8k"], data)] == ["gsm8k"]
    with pytest.raises(EvaluationError, match="known are"):
        make_tasks([], data)
