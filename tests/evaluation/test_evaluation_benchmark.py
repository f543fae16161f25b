"""`benchmarks/evaluation.py`: which files it writes, and what each of its tables tells."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.test_compare import row, write_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in an empty folder, with commands that leave a made-up evaluation."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    module = importlib.import_module("evaluation")
    monkeypatch.chdir(tmp_path)
    module.RESULTS.parent.mkdir(parents=True)
    for task in ("tool_calling", "math"):
        for method, steps in (("full_prompt", 20), ("prefillshare", 21)):
            decoder = module.RUNS / task / "lora" / method / "decoder"
            decoder.mkdir(parents=True)
            recipe = "{base: {dtype: float32}, training: {per_device_train_batch_size: 4}}"
            (decoder / "recipe.yaml").write_text(recipe)
            log = [{"loss": 1.0, "step": 1}, {"train_runtime": 2.0, "step": steps}]
            (decoder / "log_history.json").write_text(json.dumps(log))

    def run(command: list[str]) -> None:
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if command[0] == "eval":
            write_run(out, [(row("base", "base--self", boundary=None), "10")])
        else:
            (out / "scores.png").write_bytes(b"")

    monkeypatch.setattr(module, "run", run)
    return module


def start(benchmark: Any, monkeypatch: pytest.MonkeyPatch, machine: str, *options: str) -> None:
    monkeypatch.setattr(benchmark, "machine", lambda: machine)
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *options])
    benchmark.main()


def test_each_table_keeps_its_machine(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start(benchmark, monkeypatch, "first machine", "--part", "tools")
    start(benchmark, monkeypatch, "second machine", "--part", "math")
    tables = json.loads(benchmark.RESULTS.read_text())["tables"]
    assert [(table["key"], table["machine"]) for table in tables] == [
        ("tools-lora", "first machine"),
        ("math-lora", "second machine"),
    ]
    assert all(table["versions"]["torch"] for table in tables)
    page = importlib.import_module("results_page")
    monkeypatch.setattr(page, "FILES", benchmark.RESULTS.parent)
    text = page.page()
    for table in tables:
        _, found, rest = text.partition(f"### {table['title']}")
        assert found
        assert rest.lstrip().startswith(f"SmolLM2-135M-Instruct; {table['machine']}; evalplus ")
        task = "math" if table["key"].startswith("math") else "tool_calling"
        how = "steps of 4, base in float32"
        assert f"Trained: {task}-ours: 21 {how}; {task}-sft: 20 {how}." in rest


def test_a_limited_run_leaves_the_published_file(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(benchmark, monkeypatch, "here", "--part", "tools")
    published = benchmark.RESULTS.read_text()
    before = sorted(benchmark.RESULTS.parent.iterdir())
    start(benchmark, monkeypatch, "here", "--part", "math", "--limit", "2")
    assert benchmark.RESULTS.read_text() == published
    assert sorted(benchmark.RESULTS.parent.iterdir()) == before
    limited = json.loads(Path("runs/evaluation/limited/results/evaluation.json").read_text())
    assert [table["key"] for table in limited["tables"]] == ["math-lora"]
    assert not Path("runs/evaluation/math-lora").exists()
