"""Base, full_prompt, naive and prefillshare on the same held-out turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core import devices
from prefillshare_train.core.contract import ContractError
from prefillshare_train.core.loading import LoadedDecoder, load_decoder
from prefillshare_train.training import comparison
from prefillshare_train.training.comparison import HeldOut, compare_methods, held_out_report
from prefillshare_train.training.recipe import RecipeError, load_recipe
from prefillshare_train.training.run import prepare_data, run_training

RECIPE = """
base: {{model: {base}, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}, eval_fraction: 0.3}}
training: {{output_dir: replaced, max_steps: 3, learning_rate: 0.02, report_to: none,
           per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and decoders of both methods and both kinds trained by it."""
    folder = tmp_path_factory.mktemp("comparison")
    base = tiny.save_base(folder / "base")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30)]
    source = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, rows=source))
    for adapter in ("lora", "none"):
        for method in ("prefillshare", "full_prompt"):
            place = f"training.output_dir={folder / adapter / method}"
            overrides = [f"method={method}", f"decoder.adapter={adapter}", place]
            run_training(load_recipe([folder / "recipe.yaml"], overrides))
    return folder


def held_out(folder: Path) -> HeldOut:
    loaded = load_recipe([folder / "recipe.yaml"])
    data = prepare_data(loaded)
    return HeldOut(data, data.eval_examples[:4], max_new_tokens=4)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_four_rows_each_measured_as_it_says(folder: Path, adapter: str) -> None:
    ours, theirs = (folder / adapter / m / "decoder" for m in ("prefillshare", "full_prompt"))
    scores = compare_methods(held_out(folder), ours, theirs)
    found = [(s.decoder, s.prefill) for s in scores]
    assert found == [
        ("base", "self"),
        ("full_prompt", "self"),
        ("naive", "base"),
        ("prefillshare", "base"),
    ]
    base, alone, naive, conditioned = (s.held_out_loss for s in scores)
    assert len({base, alone, naive, conditioned}) == 4, "two rows measured the same thing"
    assert max(alone, conditioned) < base, "training was not measured"
    loaded = load_decoder(theirs)
    same = held_out(folder).score("x", loaded.decoder, None, loaded.contract.rule)
    assert same.held_out_loss == alone
    with loaded.prefill.base_weights():
        on_own_cache = held_out(folder).score(
            "x",
            loaded.prefill.model,
            loaded.prefill,
            loaded.contract.rule,
        )
    assert on_own_cache.held_out_loss == pytest.approx(base, rel=1e-6)


def test_without_a_full_prompt_decoder_two_rows_are_measured(folder: Path) -> None:
    scores = compare_methods(held_out(folder), folder / "lora" / "prefillshare" / "decoder", None)
    assert [s.decoder for s in scores] == ["base", "prefillshare"]


def test_decoders_that_would_be_measured_as_something_else_are_refused(folder: Path) -> None:
    ours, theirs = (folder / "lora" / m / "decoder" for m in ("prefillshare", "full_prompt"))
    with pytest.raises(ContractError, match="method full_prompt; a decoder of method prefillshare"):
        compare_methods(held_out(folder), theirs, ours)
    with pytest.raises(ContractError, match="method prefillshare; a decoder of method full_prompt"):
        compare_methods(held_out(folder), ours, ours)
    loaded = load_recipe([folder / "recipe.yaml"], ["data.system_prompt=Answer in French."])
    with pytest.raises(ContractError, match="prompt"):
        held_out_report(loaded, ours, theirs, out=None, rows=1, max_new_tokens=1, batch_size=1)


@pytest.mark.parametrize(
    ("said", "measured"), [("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_machine_does_not_choose_the_dtype_that_decoders_are_measured_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, measured: torch.dtype
) -> None:
    """Trained where bfloat16 is what `auto` means, measured where it is float32."""
    options = ["base.dtype=bfloat16", "training.max_steps=1", f"training.output_dir={tmp_path}"]
    trained = run_training(load_recipe([folder / "recipe.yaml"], options)).decoder
    assert trained is not None
    monkeypatch.setattr(devices, "has_fast_products", lambda dtype, device: False)
    dtypes = []

    def load(*args: Any, **kwargs: Any) -> LoadedDecoder:
        loaded = load_decoder(*args, **kwargs)
        dtypes.append(loaded.prefill.causal_lm.dtype)
        return loaded

    monkeypatch.setattr(comparison, "load_decoder", load)
    recipe = load_recipe([folder / "recipe.yaml"], [f"base.dtype={said}"])
    out = tmp_path / "figures.json"
    held_out_report(recipe, trained, None, out=out, rows=1, max_new_tokens=1, batch_size=4)
    assert dtypes == [measured]
    assert json.loads(out.read_text())["dtype"] == str(measured).removeprefix("torch.")


def test_a_recipe_that_evaluates_nothing_is_refused(folder: Path) -> None:
    loaded = load_recipe([folder / "recipe.yaml"], ["data.eval_fraction=0"])
    with pytest.raises(RecipeError, match="evaluates nothing"):
        held_out_report(loaded, folder, None, out=None, rows=1, max_new_tokens=1, batch_size=1)


def test_the_command_writes_figures_and_answers(folder: Path) -> None:
    out = folder / "out" / "figures.json"
    decoders = [str(folder / "lora" / m / "decoder") for m in ("prefillshare", "full_prompt")]
    arguments = ["held-out", str(folder / "recipe.yaml"), "--decoder", decoders[0]]
    arguments += ["--full-prompt", decoders[1], "--out", str(out), "--rows", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name in ("base", "full_prompt", "naive", "prefillshare"):
        assert name in result.output
    scores = json.loads(out.read_text())["scores"]
    answers = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(answers) == 12
    for score in scores:
        right = [a["correct"] for a in answers if a["decoder"] == score["decoder"]]
        assert score["n"] == 3
        assert score["exact_match"] == sum(right) / 3
    assert not list(out.parent.glob(".unfinished*"))
