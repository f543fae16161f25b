"""Recipes: composition, types, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefillshare_train.training.recipe import RecipeError, load_recipe

MINIMAL = """
base: {model: some/model}
data: {train: {source: rows.jsonl}}
training: {output_dir: out}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(recipe: Path) -> None:
    loaded = load_recipe([recipe], ["training.learning_rate=1e-4", "decoder.lora.r=64"])
    assert loaded.recipe.method == "prefillshare"
    assert loaded.recipe.decoder.lora["r"] == 64
    assert loaded.recipe.training_arguments().learning_rate == 1e-4
    assert loaded.base_dir == recipe.parent


def test_includes_come_first_and_later_files_win(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "top.yaml").write_text("include: recipe.yaml\nboundary: block_aligned:16\n")
    (tmp_path / "last.yaml").write_text("boundary: ratio:0.5\n")
    assert load_recipe([tmp_path / "top.yaml"]).recipe.boundary == "block_aligned:16"
    both = load_recipe([tmp_path / "top.yaml", tmp_path / "last.yaml"])
    assert both.recipe.boundary == "ratio:0.5"
    assert both.recipe.base.model == "some/model"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metod=full_prompt", "unknown key metod. Did you mean method?"),
        ("training.learnig_rate=1", "training.learnig_rate. Did you mean training.learning_rate?"),
        ("data.train.sorce=x", "data.train.sorce. Did you mean data.train.source?"),
        ("base.dtyp=float32", "base.dtyp. Did you mean base.dtype?"),
        ("base.dtype_is_auto=true", "unknown key base.dtype_is_auto"),
        ("boundary=first_token", "boundary rule 'first_token'"),
        ("method=sft", "prefillshare"),
        ("data.max_length=long", "data.max_length"),
        ("training.method=full_prompt", "set method at the top"),
        ("decoder.adapter=ia3", "decoder.adapter"),
    ],
)
def test_wrong_keys_and_values_are_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe([recipe], [override])
    assert message in str(error.value)


def test_files_that_are_not_recipes(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe([tmp_path / "missing.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(RecipeError, match=r"broken\.yaml is not YAML"):
        load_recipe([tmp_path / "broken.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="not a mapping"):
        load_recipe([tmp_path / "list.yaml"])
    recipe.write_text(f"include: {recipe.name}\n")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe([recipe])
    (tmp_path / "ok.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match="not key=value"):
        load_recipe([tmp_path / "ok.yaml"], ["resume"])


def test_a_missing_output_folder_and_bad_arguments(recipe: Path) -> None:
    recipe.write_text("base: {model: m}\ndata: {train: {source: r}}\n")
    with pytest.raises(RecipeError, match=r"training\.output_dir is missing"):
        load_recipe([recipe])
    recipe.write_text(MINIMAL)
    loaded = load_recipe([recipe], ["training.save_strategy=sometimes"])
    with pytest.raises(RecipeError, match="sometimes"):
        loaded.recipe.training_arguments()


def test_yaml_reads_no_as_false_and_strategies_take_it(recipe: Path) -> None:
    arguments = load_recipe([recipe], ["training.save_strategy=no"]).recipe.training_arguments()
    assert arguments.save_strategy == "no"


@pytest.mark.parametrize(
    "path",
    sorted(path for kind in ("demo", "smollm2-135m") for path in Path("recipes", kind).glob("*")),
    ids=str,
)
def test_every_shipped_recipe_composes(path: Path) -> None:
    if "Not a recipe of its own" in path.read_text():
        recipes = [other for other in path.parent.glob("*.yaml") if "include:" in other.read_text()]
        assert recipes, f"{path} is a part of nothing"
        for recipe in recipes:
            load_recipe([recipe, path]).recipe.training_arguments()
        return
    load_recipe([path]).recipe.training_arguments()
