"""Several decoders in one run: each as if it were trained alone, and the base runs prompts once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.training.decoders import train_decoders
from prefillshare_train.training.lockstep import Lockstep, generator_states
from prefillshare_train.training.recipe import (
    LoadedRecipe,
    RecipeError,
    decoder_recipes,
    load_recipe,
)
from prefillshare_train.training.run import run_training

# Dropout: each decoder's draws must be its own. Accumulation: turns are micro-batches.
OWN: dict[str, dict[str, Any]] = {
    "small": {"decoder": {"lora": {"r": 4, "lora_dropout": 0.2}}},
    "large": {
        "decoder": {"lora": {"r": 8}},
        "training": {"learning_rate": 0.03, "gradient_accumulation_steps": 2},
    },
    "full": {"decoder": {"adapter": "none"}, "training": {"max_steps": 3}},
    "other-rows": {"data": {"train": {"source": "replaced"}}},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base = tiny.save_base(tmp_path / "base")
    sources = [
        write_jsonl(
            tmp_path / f"rows{start}.jsonl",
            [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(start, start + 30)],
        )
        for start in (0, 50)
    ]
    OWN["other-rows"]["data"]["train"]["source"] = str(sources[1])
    values = {
        "base": {"model": str(base), "dtype": "float32"},
        "decoder": {"adapter": "lora", "lora": {"r": 4, "target_modules": "all-linear"}},
        "data": {"train": {"source": str(sources[0])}, "eval_fraction": 0.2},
        "training": {
            "output_dir": str(tmp_path / "together"),
            "max_steps": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "per_device_train_batch_size": 3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "decoders": OWN,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def losses(decoder: Path) -> list[float]:
    history = json.loads((decoder / "log_history.json").read_text())
    keys = ("loss", "eval_loss")
    return [entry[key] for entry in history for key in keys if key in entry]


def alone(loaded: LoadedRecipe, name: str, out: Path) -> Path:
    one = decoder_recipes(loaded)[name]
    values = {**one.values, "training": {**one.values["training"], "output_dir": str(out)}}
    path = out.with_suffix(".yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    result = run_training(load_recipe([path]))
    assert result.decoder is not None
    return result.decoder


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_each_decoder_equals_a_run_of_its_own_bit_for_bit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[SharedPrefill] = []
    plain = SharedPrefill.__init__

    def noted(self: SharedPrefill, *args: Any) -> None:
        plain(self, *args)
        bases.append(self)

    monkeypatch.setattr(SharedPrefill, "__init__", noted)
    loaded = load_recipe([recipe])
    results = train_decoders(loaded)
    assert list(results) == list(OWN)
    for name, result in results.items():
        assert result.decoder is not None
        single = alone(loaded, name, tmp_path / "alone" / name)
        assert losses(result.decoder) == losses(single), name
        weights = "model" if name == "full" else "adapter_model"
        found, wanted = (
            load_file(folder / f"{weights}.safetensors") for folder in (result.decoder, single)
        )
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        load_decoder(result.decoder)
    (base,) = bases
    assert base.ran < 0.75 * base.asked, "prompts that decoders share are run again"


def test_a_stopped_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    whole = train_decoders(load_recipe([recipe]))
    wanted = {name: losses(result.decoder) for name, result in whole.items() if result.decoder}
    for name in OWN:
        folder = tmp_path / "together" / name
        shutil.rmtree(folder / "decoder")
        for checkpoint in folder.glob("checkpoint-[34]"):
            shutil.rmtree(checkpoint)
    result = CliRunner().invoke(app, ["train", str(recipe), "--resume"])
    assert result.exit_code == 0, result.output
    assert result.output.count("decoder: ") == len(OWN)
    assert {n: losses(tmp_path / "together" / n / "decoder") for n in OWN} == wanted


def test_a_decoder_that_fails_ends_the_others_and_its_error_is_told(recipe: Path) -> None:
    steps: list[str] = []
    lockstep: Lockstep[None] = Lockstep(on_round=lambda: steps.append("round"))

    def works() -> None:
        for _ in range(5):
            steps.append("works")
            lockstep.pass_on("works")

    def fails() -> None:
        steps.append("fails")
        lockstep.pass_on("fails")
        raise ValueError("out of paper")

    states = {"works": generator_states(), "fails": generator_states()}
    with pytest.raises(ValueError, match="out of paper"):
        lockstep.run({"works": works, "fails": fails}, states)
    assert steps[:4] == ["works", "fails", "round", "works"]
    assert steps.count("works") == 2, "it goes on after another failed"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"a": {"base": {"model": "x"}}}, "decoders.a: base is common to all decoders"),
        ({"a": {"trainin": {}}}, "decoders.a: trainin is common"),
        ({"a": {"training": {"learnig_rate": 1}}}, "decoders.a: unknown key training.learnig_rate"),
        ({"a/b": {}}, "decoders.a/b: not a folder's name"),
        (
            {"a": {"training": {"output_dir": "x"}}, "b": {"training": {"output_dir": "x"}}},
            "decoders a and b would both write to",
        ),
    ],
)
def test_mistakes_are_told_when_the_recipe_is_read(
    recipe: Path, own: dict[str, Any], message: str
) -> None:
    values = yaml.safe_load(recipe.read_text()) | {"decoders": own}
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as error:
        load_recipe([recipe])
    assert message in str(error.value)


def test_a_dry_run_checks_each_decoder(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.output.count("dry run ok") == len(OWN)
    values = yaml.safe_load(recipe.read_text())
    values["decoders"]["other-rows"]["data"]["train"]["source"] = "missing.jsonl"
    recipe.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 2
    assert "missing.jsonl" in result.output


def test_a_baseline_without_a_prefill_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="full_prompt has none"):
        train_decoders(load_recipe([recipe], ["method=full_prompt"]))
