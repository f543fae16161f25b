"""The task files with the model: from Python, and by the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tests.data.helpers import write_jsonl
from tests.evaluation.lm_eval_helpers import decoder_of, generation, make_decoders
from typer.testing import CliRunner

from prefillshare_train.cli import lm_eval as command
from prefillshare_train.evaluation.lm_eval_tasks import task_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and decoders."""
    return make_decoders(tmp_path_factory.mktemp("command"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(5)]
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", rows)
    return tmp_path


def test_simple_evaluate_takes_the_object(folder: Path, data_dir: Path) -> None:
    manager = TaskManager(
        include_path=str(task_folder()),
        include_defaults=False,
        metadata={"data_dir": str(data_dir)},
    )
    lm = decoder_of(folder, batch_size=2)
    results = simple_evaluate(
        model=lm,
        tasks=["gsm8k_local"],
        task_manager=manager,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 6},
        bootstrap_iters=0,
    )
    samples = [s for s in results["samples"]["gsm8k_local"] if s["filter"] == "flexible-extract"]
    prompts = [s["arguments"][0][0] for s in samples]
    assert len(prompts) == 5
    assert prompts[0].endswith("Question: What is 0?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    answers = lm.generate_until(
        generation(*prompts, max_gen_toks=6, until=["Question:", "</s>", "<|im_end|>"])
    )
    assert [s["resps"][0][0] for s in samples] == answers
    score = results["results"]["gsm8k_local"]["exact_match,flexible-extract"]
    assert score == sum(s["exact_match"] for s in samples) / 5
    assert results["config"]["boundary"] == "last_token"


def run(*arguments: object) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("lm-eval", context_settings=command.CONTEXT_SETTINGS)(command.lm_eval)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["lm-eval", *map(str, arguments)])


def test_the_command_hands_its_flags_to_lm_eval(folder: Path, data_dir: Path) -> None:
    place = folder / "decoder" / "decoder"
    result = run(
        *("--model", "prefillshare", "--model_args", f"decoder={place},prefill=self"),
        *("--tasks", "gsm8k_local", "--include_path", task_folder(), "--apply_chat_template"),
        *("--metadata", f"data_dir={data_dir}", "--gen_kwargs", "max_gen_toks=4"),
        *("--limit", 2, "--batch_size", 2, "--output_path", data_dir / "out"),
    )
    assert result.exit_code == 0, result.output
    (file,) = (data_dir / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    assert written["n-samples"]["gsm8k_local"]["effective"] == 2
    assert written["config"]["prefill"] == "self"


def test_the_command_tells_mistakes_in_a_line() -> None:
    help_text = run("run", "--help")
    assert help_text.exit_code == 0
    assert "--include_path" in help_text.output
    result = run("--model", "prefillshare", "--tasks", task_folder() / "gsm8k_local.yaml")
    assert result.exit_code == 2, result.output
    assert "name the decoder's folder" in result.output


def test_the_command_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("--tasks", "x")
    assert result.exit_code == 2
    assert "pip install 'prefillshare-train[eval]'" in result.output
