"""Decoders behind one router must have been trained over one base and on one kind of prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import tiny_tokenizer

from prefillshare_train.core.contract import Contract
from prefillshare_train.data import make_renderer
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.prompts import Prompting

RENDERER = make_renderer(tiny_tokenizer())


def decoder(folder: Path, **changes: Any) -> Path:
    contract = Contract(
        base_id="base",
        base_revision=None,
        base_fingerprint="sha256:1",
        cache_config={},
        prompt=RENDERER.prompt_contract(),
        boundary="last_token",
        kv_dtype="float32",
    )
    folder.mkdir()
    RENDERER.saved_tokenizer().save_pretrained(folder)
    dataclasses.replace(contract, **changes).save(folder)
    return folder


def config(handover: str = "nixl", **folders: Path) -> RouterConfig:
    return RouterConfig.parse(
        {
            "handover": handover,
            "prefill": ["http://p"],
            "decoders": {
                name: {"replicas": [f"http://{name}"], "folder": folder}
                for name, folder in folders.items()
            },
        }
    )


def test_the_contracts_prompts(tmp_path: Path) -> None:
    one, two = decoder(tmp_path / "one"), decoder(tmp_path / "two", boundary="generation_prompt")
    loaded = Prompting.load(config("store", one=one, two=two))
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.renderer.prompt_ids(messages) == RENDERER.prompt_ids(messages)
    assert [str(rule) for rule in loaded.rules.values()] == ["last_token", "generation_prompt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_fingerprint": "sha256:2"}, ["sha256:1", "sha256:2", "cannot share a prefill"]),
        ({"prompt": RENDERER.prompt_contract() | {"system_prompt": "Be kind."}}, ["Be kind."]),
        ({"boundary": "generation_prompt"}, ["generation_prompt", "nixl", "last_token"]),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    one, two = decoder(tmp_path / "one"), decoder(tmp_path / "two", **changes)
    with pytest.raises(VllmError) as caught:
        Prompting.load(config(one=one, two=two))
    for word in ["decoder two", *words]:
        assert word in str(caught.value)


def test_a_folder_without_a_contract(tmp_path: Path) -> None:
    with pytest.raises(VllmError, match="has no prefillshare_contract"):
        Prompting.load(config(one=tmp_path))
    (tmp_path / "base").mkdir()
    values = config(one=tmp_path).model_dump() | {
        "base": str(tmp_path / "base"),
        "decoders": {"one": {"replicas": ["http://one"]}},
    }
    with pytest.raises(VllmError, match=f"the base {tmp_path / 'base'}"):
        Prompting.load(RouterConfig.parse(values))
