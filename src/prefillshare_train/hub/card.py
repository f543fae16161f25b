"""The model card: how to load the decoder, what it was trained against, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.measured import eval_results, evaluation_rows, training_log
from prefillshare_train.hub.recipe import is_local

CARD_NAME = "README.md"
_PACKAGE = "prefillshare-train"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What no file of a checkpoint tells.

    Attributes:
        evaluation: folder or `summary.json` of an evaluation of this decoder.
        hardware: what it was trained on.
        co2_grams: measured emissions of the training run.
        license: an identifier such as `apache-2.0`.
    """

    evaluation: Path | None = None
    hardware: str | None = None
    co2_grams: float | None = None
    license: str | None = None


def write_card(
    folder: Path,
    name: str,
    checkpoint: Path,
    contract: Contract,
    recipe: dict[str, Any],
    facts: CardFacts,
) -> None:
    """Write `README.md` of an exported decoder.

    Args:
        folder: the exported decoder, complete but for the card.
        name: hub id or folder to load it by.
        checkpoint: what it was exported from; evaluation and log belong to its weights.
        contract: as exported.
        recipe: as exported; empty where there is none.

    Raises:
        HubError: the evaluation does not judge this decoder.
    """
    rows = evaluation_rows(facts.evaluation, checkpoint, contract) if facts.evaluation else []
    log = training_log(checkpoint)
    data = _metadata(name.split("/")[-1], contract, recipe, facts, rows)
    text = (
        _environment()
        .from_string(_template())
        .render(
            name=name,
            contract=contract,
            base=_base_link(contract.base_id),
            alora=_is_alora(folder),
            sources=_sources(recipe),
            settings=_settings(recipe),
            rows=rows,
            log=log,
            facts=facts,
            version=version(_PACKAGE),
        )
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD_NAME)


def is_hub_id(text: str) -> bool:
    """Whether a base's name can mean the same to others."""
    if is_local(text):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _metadata(
    name: str,
    contract: Contract,
    recipe: dict[str, Any],
    facts: CardFacts,
    rows: list[dict[str, Any]],
) -> ModelCardData:
    adapter = contract.adapter != "none"
    extra: dict[str, Any] = {}
    base = contract.base_id if is_hub_id(contract.base_id) else None
    if base:
        extra["base_model_relation"] = "adapter" if adapter else "finetune"
    if facts.co2_grams is not None:
        extra["co2_eq_emissions"] = {
            "emissions": facts.co2_grams,
            "training_type": "fine-tuning",
            **({"hardware_used": facts.hardware} if facts.hardware else {}),
        }
    return ModelCardData(
        base_model=base,
        datasets=[s["source"] for s in _sources(recipe) if s["public"]] or None,
        eval_results=eval_results(rows) or None,
        library_name="peft" if adapter else "transformers",
        license=facts.license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["prefillshare", "cache-conditioned", "kv-cache", *(["lora"] if adapter else [])],
        **extra,
    )


def _base_link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"


def _sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets of a recipe, and whether each can be found on the hub."""
    found = []
    for use in ("train", "eval"):
        source = (recipe.get("data") or {}).get(use)
        if source:
            name = str(source["source"])
            found.append({**source, "use": use, "public": "/" in name and is_hub_id(name)})
    return found


def _settings(recipe: dict[str, Any]) -> str:
    shown = {k: v for k, v in recipe.items() if k not in ("base", "include")}
    return yaml.safe_dump(shown, sort_keys=False).rstrip() if shown else ""


def _is_alora(folder: Path) -> bool:
    path = folder / "adapter_config.json"
    return path.is_file() and bool(yaml.safe_load(path.read_text())["alora_invocation_tokens"])


def _template() -> str:
    return (resources.files(__package__) / "card.md.jinja").read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
