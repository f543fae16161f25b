"""The demo, end to end, on a tiny model; and two decoders that may not share a cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.loading import add_adapter, load_decoder
from prefillshare_train.training import demo
from prefillshare_train.training.demo import run_demo

RECIPE = """
base: {{model: replaced, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}, eval_fraction: 0.3}}
training: {{output_dir: replaced, max_steps: 3, logging_steps: 1, report_to: none,
           per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_base(tmp_path / "base")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "recipes").mkdir()
    for task in ("tool_calling", "math"):
        (tmp_path / "recipes" / f"{task}.yaml").write_text(RECIPE.format(rows=source))
    return tmp_path


def test_it_trains_compares_shares_and_reuses(folder: Path) -> None:
    out = folder / "out"
    text = run_demo(folder / "base", out, folder / "recipes", rows=3, steps=2)
    for part in ("base", "decoder on the base's cache", "one prefill:", "math decoder:"):
        assert part in text
    comparison = json.loads((out / "comparison.json").read_text())
    assert [row["n"] for row in comparison] == [3, 3]
    losses = [row["held_out_loss"] for row in comparison]
    assert losses[0] != losses[1], "the base was measured with its adapters on"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = out / "math" / "decoder" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert run_demo(folder / "base", out, folder / "recipes", rows=3, steps=2) == text
    assert weights.stat().st_mtime_ns == written, "a finished decoder is trained again"


def test_only_a_repeated_demo_says_that_it_reused_something(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(model: Path, out: Path, *_: Any, **__: Any) -> str:
        out.mkdir(exist_ok=True)
        return "a table"

    monkeypatch.setattr(demo, "run_demo", ran)
    places = ["--model", folder / "base", "--out", folder / "out", "--recipes", folder / "recipes"]
    first, second = (
        CliRunner().invoke(app, ["demo", *map(str, places)]).output.splitlines() for _ in range(2)
    )
    assert first == ["a table", "0.0 minutes"]
    assert second == ["a table", "0.0 minutes; what an earlier start had finished was reused"]


def test_a_stopped_demo_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: Any = SimpleNamespace(decoder=None)
    monkeypatch.setattr(demo, "run_training", lambda *_, **__: stopped)
    places = ["--model", folder / "base", "--out", folder / "out", "--recipes", folder / "recipes"]
    found = CliRunner().invoke(app, ["demo", *map(str, places)])
    assert found.exit_code == 143
    assert "the same command goes on" in found.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_fingerprint": "sha256:other"}, "base fingerprint"),
        ({"boundary": "ratio:0.5"}, "boundary rule"),
        ({"prompt": {"template_sha256": "other"}}, "prompt template_sha256"),
    ],
)
def test_decoders_that_cannot_read_one_cache_are_refused(
    folder: Path, change: dict[str, object], message: str
) -> None:
    out = folder / "out"
    run_demo(folder / "base", out, folder / "recipes", rows=1, steps=1)
    loaded = load_decoder(out / "tool_calling" / "decoder")
    other = out / "math" / "decoder"
    dataclasses.replace(Contract.load(other), **change).save(other)
    with pytest.raises(ContractError, match=message):
        add_adapter(loaded, other, "math")


def test_rows_rendered_otherwise_than_in_training_are_refused(folder: Path) -> None:
    out = folder / "out"
    run_demo(folder / "base", out, folder / "recipes", rows=1, steps=1)
    recipe = folder / "recipes" / "tool_calling.yaml"
    recipe.write_text(
        recipe.read_text().replace("eval_fraction", "system_prompt: Hi, eval_fraction")
    )
    with pytest.raises(ContractError, match="system_prompt"):
        run_demo(folder / "base", out, folder / "recipes", rows=1, steps=1)


def test_a_full_decoder_keeps_the_dtype_it_was_saved_in(folder: Path) -> None:
    from prefillshare_train.training.recipe import load_recipe
    from prefillshare_train.training.run import run_training

    overrides = [
        f"base.model={folder / 'base'}",
        "base.dtype=bfloat16",
        "decoder.adapter=none",
        f"training.output_dir={folder / 'full'}",
    ]
    run_training(load_recipe([folder / "recipes" / "math.yaml"], overrides))
    loaded = load_decoder(folder / "full" / "decoder")
    assert next(loaded.decoder.parameters()).dtype == torch.float32
    assert loaded.prefill.causal_lm.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must be LoRA"):
        add_adapter(loaded, folder / "full" / "decoder", "again")
