"""Generated documents are what the code generates."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from prefillshare_train.data.config import FormatName
from prefillshare_train.training.recipe import RecipeError, parse_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "training.md").read_text()


def test_training_md_is_up_to_date() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_that_the_method_adds_is_documented() -> None:
    for key in ("training.generate_every", "data.train_on", "base.revision", "decoder.lora"):
        assert f"`{key}`" in TEXT


def test_a_recipe_takes_every_training_key_that_is_documented() -> None:
    keys = set(re.findall(r"^(?:- \*\*|\| )`training\.(\w+)`", TEXT, re.MULTILINE))
    assert {"peak_tflops", "learning_rate", "output_dir"} <= keys
    training = dict.fromkeys(keys, 0)
    recipe = parse_recipe(
        {"base": {"model": "m"}, "data": {"train": {"source": "rows"}}, "training": training}
    )
    assert set(recipe.training) == keys


@pytest.mark.parametrize("key", ["method", "boundary"])
def test_keys_that_a_recipe_refuses_under_training_are_not_documented(key: str) -> None:
    values = {"base": {"model": "m"}, "data": {"train": {"source": "rows"}}}
    with pytest.raises(RecipeError, match=key):
        parse_recipe({**values, "training": {"output_dir": "run", key: "x"}})
    assert f"`training.{key}`" not in TEXT


@pytest.mark.parametrize("name", get_args(FormatName))
def test_every_format_has_a_row_or_is_explained(name: str) -> None:
    pattern = rf"^\| `{name}` \|" if name != "auto" else r"^`auto` takes"
    assert re.search(pattern, TEXT, re.MULTILINE)
