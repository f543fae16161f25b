"""A checkpoint goes on under the contract it began with, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.training import tiny

from prefillshare_train.core import devices
from prefillshare_train.core.contract import Contract
from prefillshare_train.training.recipe import RecipeError, load_recipe
from prefillshare_train.training.run import RunResult, run_training


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    training = {"max_steps": 2, "save_steps": 1, "bf16": "auto"}
    return tiny.save_recipe(tmp_path, training, base={"model": str(tmp_path / "base")})


def train(recipe: Path, *overrides: str, resume: bool = False) -> RunResult:
    return run_training(load_recipe([recipe], overrides), resume=resume)


def machine(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """One that multiplies in bfloat16, or one that does not."""
    monkeypatch.setattr(devices, "has_fast_products", lambda dtype, device: bfloat16)


@pytest.mark.parametrize(("bfloat16", "name"), [(True, "bfloat16"), (False, "float32")])
def test_a_decoder_and_its_recipe_say_what_auto_came_out_as(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: bool, name: str
) -> None:
    machine(monkeypatch, bfloat16=bfloat16)
    result = train(recipe)
    assert result.decoder is not None
    assert result.trainer.args.bf16 == bfloat16
    assert Contract.load(result.decoder).kv_dtype == name
    written = yaml.safe_load((result.decoder / "recipe.yaml").read_text())
    assert written["base"]["dtype"] == name
    assert written["training"]["bf16"] == bfloat16


def test_another_machine_may_not_change_the_dtype_of_a_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, bfloat16=True)
    train(recipe)
    machine(monkeypatch, bfloat16=False)
    with pytest.raises(RecipeError, match="kv_dtype: 'bfloat16', now 'float32'"):
        train(recipe, "training.max_steps=3", resume=True)
    told = ("training.max_steps=3", "base.dtype=bfloat16", "training.bf16=true")
    assert train(recipe, *told, resume=True).trainer.state.global_step == 3


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_run_killed_after_its_last_checkpoint_trains_no_further(
    recipe: Path, adapter: str
) -> None:
    undisturbed = train(recipe, f"decoder.adapter={adapter}").decoder
    assert undisturbed is not None
    weights = load_file(next(undisturbed.glob("*model.safetensors")))
    shutil.rmtree(undisturbed)
    resumed = train(recipe, f"decoder.adapter={adapter}", resume=True)
    assert resumed.trainer.state.global_step == 2
    assert resumed.decoder is not None
    again = load_file(next(resumed.decoder.glob("*model.safetensors")))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("boundary=ratio:0.5", "boundary: 'last_token', now 'ratio:0.5'"),
        ("method=full_prompt", "method: 'prefillshare', now 'full_prompt'"),
        ("data.chat_template=chatml-tools", "prompt: "),
    ],
)
def test_a_run_that_began_over_another_cache_is_refused(
    recipe: Path, change: str, message: str
) -> None:
    train(recipe)
    with pytest.raises(RecipeError, match=r"checkpoint-2 was trained with another") as error:
        train(recipe, change, "training.max_steps=3", resume=True)
    assert message in str(error.value)
    assert train(recipe, "training.max_steps=3", resume=True).trainer.state.global_step == 3


def test_another_base_of_the_same_name_is_refused(recipe: Path, tmp_path: Path) -> None:
    train(recipe)
    tiny.save_base(tmp_path / "base", seed=1)
    with pytest.raises(RecipeError, match="base_fingerprint"):
        train(recipe, "training.max_steps=3", resume=True)
