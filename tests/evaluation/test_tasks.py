"""Benchmarks by name, and the command from its flags to its table."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import tiny_tokenizer, write_jsonl
from tests.evaluation.bfcl_cases import write_data
from tests.evaluation.sandboxes import sandbox_or_skip
from tests.evaluation.test_humaneval import PROBLEMS
from tests.serving.served import save_served
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.evaluation import tasks as benchmarks
from prefillshare_train.evaluation.bfcl_scoring import ensure_environment
from prefillshare_train.evaluation.code_task import limits_of
from prefillshare_train.evaluation.task import EvaluationError
from prefillshare_train.evaluation.tasks import NAMES, make_tasks


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
        arguments = command(base, data, out, "--limit", limit, "--revision", "main")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        summary = json.loads((out / "summary.json").read_text())
        (row,) = summary["results"]
        assert row["n"] == int(limit)
        assert (row["decoder"], row["prefill"], row["sharing_ratio"]) == ("base", "self", 0.0)
    assert "one prefill" not in result.output, "the base ran each prompt for itself alone"
    assert summary["base"]["revision"] == "main"
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
        (["--base", "no/such/base"], "--base no/such/base: there is no model"),
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


@pytest.fixture
def all_data(data: Path) -> Path:
    """One or two made-up items of every benchmark; skips where a harness cannot run here."""
    try:
        ensure_environment()
    except EvaluationError as error:
        pytest.skip(f"BFCL's environment is absent: {error}")
    sandbox_or_skip(limits_of(3))
    for folder in ("gsm_plus", "humaneval", "humaneval_plus"):
        (data / folder).mkdir()
    row = {"question": "1 + 1?", "solution": "2", "answer": "2", "perturbation_type": "none"}
    write_jsonl(data / "gsm_plus" / "gsmplus_testmini.jsonl", [row])
    write_jsonl(data / "humaneval" / "HumanEval.jsonl.gz", PROBLEMS)
    write_jsonl(data / "humaneval_plus" / "HumanEvalPlus.jsonl.gz", PROBLEMS)
    for category in ("simple_python", "multiple"):
        write_data(data / "bfcl_v4", category)
    return data


def test_all_benchmarks_are_built_from_a_named_folder(all_data: Path) -> None:
    tasks = make_tasks(NAMES, all_data, max_new_tokens=9)
    assert tuple(task.name for task in tasks) == NAMES
    assert [len(task.items()) for task in tasks] == [2, 1, 2, 2, 1, 1]
    assert {task.items()[0].max_new_tokens for task in tasks} == {9}
    (all_data / "humaneval" / "HumanEval.jsonl.gz").unlink()
    with pytest.raises(EvaluationError, match=r"HumanEval\.jsonl\.gz: cannot be read"):
        make_tasks(["humaneval"], all_data)


def test_what_is_not_in_the_usual_folder_comes_from_the_harnesses(
    all_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plus = all_data / "humaneval_plus" / "HumanEvalPlus.jsonl.gz"
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    monkeypatch.setattr(benchmarks, "DEFAULT_DATA", all_data)
    usual = {task.name: len(task.items()) for task in make_tasks(NAMES)}
    assert list(usual.values()) == [2, 1, 2, 2, 1, 1]
    other = write_jsonl(tmp_path / "other.jsonl", PROBLEMS[:1])
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(other))
    assert len(make_tasks(["humaneval_plus"])[0].items()) == 1
    assert len(make_tasks(["humaneval_plus"], all_data)[0].items()) == 2, "a named folder decides"
    monkeypatch.setattr(benchmarks, "DEFAULT_DATA", tmp_path / "nowhere")
    own = {task.name: len(task.items()) for task in make_tasks(NAMES[2:])}
    assert list(own.values()) == [164, 1, 400, 200]
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH")
    monkeypatch.setattr("evalplus.data.utils.CACHE_DIR", str(tmp_path))
    (tmp_path / "HumanEvalPlus-v0.1.10.jsonl").write_bytes(gzip.decompress(plus.read_bytes()))
    assert len(make_tasks(["humaneval_plus"])[0].items()) == 2
    with pytest.raises(EvaluationError, match=r"nowhere/gsm8k/test\.jsonl is not there.*--data"):
        make_tasks(["gsm8k"])


def test_how_programs_are_judged_is_recorded(all_data: Path) -> None:
    def settings(**options: Any) -> list[dict[str, Any]]:
        return [task.settings for task in make_tasks(NAMES[2:4], all_data, **options)]

    plain, plus = settings()
    assert (plain["workers"], plus["workers"]) == (2, 1)
    plain, plus = settings(judge_workers=3, timeout_scale=2, min_time_limit=7)
    assert (plain["workers"], plus["workers"]) == (3, 3)
    assert (plain["timeout_seconds"], plus["min_time_limit_seconds"]) == (6, 7)


def test_the_command_tells_what_one_prefill_saved(tmp_path: Path, data: Path) -> None:
    folder, out = save_served(tmp_path / "models", ("math", "code")), tmp_path / "out"
    decoders = [f"--decoder={folder / name}" for name in ("math", "code")]
    result = CliRunner().invoke(app, command(folder / "base", data, out, *decoders))
    assert result.exit_code == 0, result.output
    saved = json.loads((out / "summary.json").read_text())["shared_prefill"]["gsm8k"]
    assert (
        f"gsm8k: one prefill for all decoders, so that the base ran {saved['base_tokens']} prompt "
        f"tokens in place of {2 * saved['base_tokens']} (50% saved)."
    ) in result.output


def test_the_command_judges_as_told(all_data: Path, tmp_path: Path) -> None:
    base, out = tiny.save_base(tmp_path / "base"), tmp_path / "out"
    config = base / "config.json"
    roomy = json.loads(config.read_text()) | {"max_position_embeddings": 8192}
    config.write_text(json.dumps(roomy))
    arguments = command(base, all_data, out, "--chat-template", "chatml-tools")
    flags = ["--judge-workers", "3", "--timeout-scale", "2", "--min-time-limit", "7"]
    result = CliRunner().invoke(
        app, [*arguments, "--tasks", "humaneval,humaneval_plus,bfcl_multiple", *flags]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "summary.json").read_text())["tasks"]
    assert found["humaneval"]["settings"]["timeout_seconds"] == 6
    assert found["humaneval_plus"]["settings"]["min_time_limit_seconds"] == 7
    assert {found[name]["settings"]["workers"] for name in NAMES[2:4]} == {3}
    (file,) = (out / "bfcl" / "base--self").rglob("BFCL_v4_multiple_result.json")
    (answer,) = (out / "outputs" / "bfcl_multiple.jsonl").read_text().splitlines()
    line = json.loads(file.read_text())
    assert line == {"id": "multiple_0", "result": json.loads(answer)["output"]}


def test_a_base_without_a_chat_template_completes_texts(all_data: Path, tmp_path: Path) -> None:
    base, out = tiny.save_base(tmp_path / "base"), tmp_path / "out"
    tiny_tokenizer(None).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    arguments = command(base, all_data, out)
    result = CliRunner().invoke(app, [*arguments, "--tasks", "bfcl_multiple"])
    assert result.exit_code == 2
    assert "bfcl_multiple: BFCL asks in chats" in result.output
    assert "--chat-template chatml-tools" in result.output
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(6)]
    write_jsonl(all_data / "gsm8k" / "train.jsonl", rows)
    result = CliRunner().invoke(app, [*arguments, "--tasks", "gsm8k,humaneval"])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "summary.json").read_text())["tasks"]
    assert found["gsm8k"]["settings"]["shots"] == 5
    assert found["humaneval"]["settings"]["prompt_style"] == "evalplus direct completion"
    lines = (out / "outputs" / "humaneval.jsonl").read_text().splitlines()
    prompts = {r["item_id"]: r["prompt_sha256"] for r in map(json.loads, lines)}
    for problem in PROBLEMS:
        ids = tiny_tokenizer(None)(str(problem["prompt"]).strip() + "\n")["input_ids"]
        digest = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in ids)).hexdigest()
        assert prompts[problem["task_id"]] == digest
