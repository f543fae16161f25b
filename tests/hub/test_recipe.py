"""The recipe as others see it: places are cut to their last part, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.data.helpers import pairs, write_jsonl
from tests.hub import decoders

from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.card import is_hub_id
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions
from prefillshare_train.hub.push import PushOptions, publish_decoder
from prefillshare_train.hub.recipe import is_local, published_recipe
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import make_contract, prepare_data

LONG = "Answer well. " * 40 + "And/or refuse."
HUB_DATA = "meta-math/MetaMathQA"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


@pytest.fixture(scope="module")
def contract(base: Path) -> Contract:
    folder = decoders.save_decoder(base.parent / "decoder", base, lora={})
    return Contract.load(folder)


def published(tmp_path: Path, contract: Contract, recipe: dict[str, Any]) -> dict[str, Any]:
    for name in ("run", "out"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return published_recipe(tmp_path / "run", tmp_path / "out", contract)


@pytest.mark.parametrize(
    "prose", [LONG, "<think></think>/a/b. Answer>.", "/etc/hosts", "a/b", "nul\0/"]
)
def test_prose_is_left_as_it_is(tmp_path: Path, contract: Contract, prose: str) -> None:
    recipe = {
        "data": {
            "train": {"source": HUB_DATA, "revision": "refs/pr/1", "columns": {"a": prose}},
            "system_prompt": prose,
            "chat_template_kwargs": {"date": prose},
        },
        "decoder": {"lora": {"target_modules": r".*/.*/q"}},
    }
    found = published(tmp_path, contract, recipe)
    assert {key: found[key] for key in recipe} == recipe


def test_places_are_cut(tmp_path: Path, contract: Contract) -> None:
    recipe = {
        "data": {
            "train": {"source": "./data/customers", "tools_file": "data/tool.jsonl"},
            "eval": {"source": "data/customers.jsonl"},
            "chat_template": "templates/mine.jinja",
        },
        "local_copies": {HUB_DATA: "copies/math"},
        "training": {
            "deepspeed": "configs/zero2.json",
            "fsdp_config": {"offload": "/scratch/me"},
            "optim": "org/kernel",
            "project": "~/notes",
        },
    }
    found = published(tmp_path, contract, recipe)
    assert found["data"] == {
        "train": {"source": "customers", "tools_file": "tool.jsonl"},
        "eval": {"source": "customers.jsonl"},
        "chat_template": "mine.jinja",
    }
    assert found["local_copies"] == {HUB_DATA: "math"}
    assert found["training"] == {
        "deepspeed": "zero2.json",
        "fsdp_config": {"offload": "me"},
        "optim": "org/kernel",
        "project": "notes",
    }


@pytest.mark.parametrize(
    "text", ["a/b.jsonl", "a/b.JSON.GZ", "a/b.jinja", "./a/b", "a/b/c", ".a/b"]
)
def test_names_that_can_only_be_places(text: str) -> None:
    assert is_local(text)
    assert not is_hub_id(text)


def test_places_are_told_from_hub_ids_when_training_and_not_when_exporting(
    base: Path, contract: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data/rows` lies beside the recipe and `models/base` in the directory of the run."""
    here, there = tmp_path / "here", tmp_path / "there"
    write_jsonl(tmp_path / "recipes" / "data" / "rows" / "train.jsonl", pairs(8))
    copy = write_jsonl(tmp_path / "copy.jsonl", pairs(4, start=8))
    (here / "models").mkdir(parents=True)
    (here / "models" / "base").symlink_to(base)
    # Whoever exports has folders of the very names of the hub's.
    (there / HUB_DATA).mkdir(parents=True)
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "base: {model: models/base}\n"
        f"data: {{train: {{source: data/rows}}, eval: {{source: {HUB_DATA}}}}}\n"
        f"local_copies: {{{HUB_DATA}: {copy}}}\n"
        "training: {output_dir: out}\n"
    )
    monkeypatch.chdir(here)
    loaded = load_recipe([tmp_path / "recipes" / "mine.yaml"])
    data = prepare_data(loaded)
    made = make_contract(loaded.recipe, decoders.load_causal_lm(str(base)), data, "sha256:0")
    monkeypatch.chdir(there)
    found = published(tmp_path, made, yaml.safe_load(loaded.to_yaml()))
    assert found["data"]["train"]["source"] == "rows"
    assert found["data"]["eval"]["source"] == HUB_DATA
    assert made.base_id == "./models/base"
    assert not is_hub_id(made.base_id)
    run = decoders.save_decoder(tmp_path / "trained", base, lora={}, base_id=made.base_id)
    with pytest.raises(HubError, match=r"'./models/base', which nobody else can load"):
        publish_decoder(run, "someone/tools", ExportOptions(), PushOptions())
