"""The recipe that made a decoder, as it may be shown to others."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import yaml

from prefillshare_train.core.contract import Contract
from prefillshare_train.data.readers import SUFFIXES

RECIPE_NAME = "recipe.yaml"
# Where a run wrote to and whom it reported to is nobody else's business, and no part of the result.
_PRIVATE = ("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "report_to")
# Keys that hold places, and keys that may.
_PLACES = (
    "data.*.tools_file",
    "data.chat_template",
    "data.prompt_template",
    "local_copies.*",
    "training.deepspeed",
    "training.fsdp_config",
)
_NAMES = ("data.train.source", "data.eval.source", "training.*")


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
    recipe: dict[str, Any] = _without_places(values)
    recipe.setdefault("base", {})["model"] = contract.base_id
    training = recipe.get("training") or {}
    recipe["training"] = {key: v for key, v in training.items() if key not in _PRIVATE}
    (folder / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False))
    return recipe


def is_local(text: str) -> bool:
    """Whether a name can only be a place; one that could be a hub id too got `./` in training."""
    return (
        text.startswith(("/", "~", "."))
        or text.count("/") > 1
        or text.lower().endswith((*SUFFIXES, ".jinja"))
    )


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _without_places(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_places(item, key) for item in value]
    if isinstance(value, str) and "/" in value and _is_place(key, value):
        return Path(value).name or value
    return value


def _is_place(key: str, value: str) -> bool:
    """Keys decide: a prompt or a revision may look like a path."""
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in _PLACES):
        return True
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _NAMES) and is_local(value)
