"""README's Python runs, over a tiny base in place of the one on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
TRAIN, ANSWER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RECIPE = """
base: {model: base, dtype: float32}
decoder: {adapter: lora, lora: {r: 4, target_modules: all-linear}}
data: {train: {source: rows.jsonl}}
training: {output_dir: run, max_steps: 2, report_to: none, disable_tqdm: true}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.save_base(tmp_path / "base")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training(place: Path) -> None:
    assert len(TRAIN.split("\n\n", 1)[1].splitlines()) <= 10, "a ten-line example"
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name in TRAIN
    exec(TRAIN.replace(name, str(place / "base")), {})
    assert list((place / "run").glob("checkpoint-*"))


def test_answering(place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE)
    assert CliRunner().invoke(app, ["train", "recipe.yaml"]).exit_code == 0
    left: dict[str, Any] = {}
    exec(ANSWER, left)
    assert 1 <= len(left["answer"]) <= 128
