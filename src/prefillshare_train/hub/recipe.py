"""The recipe that made a decoder, as it may be shown to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prefillshare_train.core.contract import Contract

RECIPE_NAME = "recipe.yaml"
# Where a run wrote to and whom it reported to is nobody else's business, and no part of the result.
_PRIVATE = ("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "report_to")


def published_recipe(checkpoint: Path, folder: Path, contract: Contract) -> dict[str, Any]:
    """Copy a run's recipe, with local paths cut to their last part.

    A `checkpoint-N` folder has none of its own; nothing is written then.

    Returns:
        The recipe as written; empty where there is none.
    """
    path = checkpoint / RECIPE_NAME
    if not path.is_file():
        return {}
    values: Any = yaml.safe_load(path.read_text())
    recipe: dict[str, Any] = _without_paths(values)
    recipe.setdefault("base", {})["model"] = contract.base_id
    training = recipe.get("training") or {}
    recipe["training"] = {key: v for key, v in training.items() if key not in _PRIVATE}
    (folder / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False))
    return recipe


def is_local(text: str) -> bool:
    """Whether a text names a place here; a hub id has one slash and no such beginning."""
    return text.startswith(("/", "~", "./", "../")) or text.count("/") > 1 or Path(text).exists()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value and is_local(value):
        return Path(value).name
    return value
