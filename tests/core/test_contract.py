"""The contract: what fits, what is refused, and that the message shows both values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.core import families

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import (
    CONTRACT_NAME,
    Contract,
    ContractError,
    cache_config,
    weights_fingerprint,
)


@pytest.fixture
def contract() -> Contract:
    model = families.build("llama", torch.float32)
    return Contract(
        base_id="org/base",
        base_revision="abc",
        base_fingerprint=weights_fingerprint(model),
        cache_config=cache_config(model.config),
        prompt={"template_sha256": "t"},
        boundary="last_token",
        kv_dtype="bfloat16",
    )


def test_what_was_saved_is_loaded_and_fits(contract: Contract, tmp_path: Path) -> None:
    contract.save(tmp_path)
    loaded = Contract.load(tmp_path)
    assert loaded == contract
    model = families.build("llama", torch.float32)
    loaded.verify(
        base_fingerprint=weights_fingerprint(model),
        config=model.config,
        prompt={"template_sha256": "t"},
        boundary=BoundaryRule.parse("last_token"),
    )


def test_another_base_is_refused_with_both_fingerprints(contract: Contract) -> None:
    other = weights_fingerprint(families.build("llama", torch.float32, seed=9))
    with pytest.raises(ContractError) as error:
        contract.verify(base_fingerprint=other)
    assert other in str(error.value)
    assert contract.base_fingerprint in str(error.value)
    assert "org/base" in str(error.value)


def test_every_difference_is_listed(contract: Contract) -> None:
    config = families.build("llama", torch.float32).config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 123.0}
    with pytest.raises(ContractError) as error:
        contract.verify(
            config=config,
            prompt={"template_sha256": "other"},
            boundary=BoundaryRule.parse("ratio:0.5"),
        )
    for part in ("rope_parameters", "123.0", "template_sha256", "'other'", "ratio:0.5"):
        assert part in str(error.value)


def test_one_checkpoint_has_one_fingerprint_and_a_changed_weight_another() -> None:
    model = families.build("llama", torch.float32)
    rounded = families.build("llama", torch.float32).to(torch.bfloat16)
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(rounded) == fingerprint
    wrapped = families.with_lora(families.build("llama", torch.float32))
    assert weights_fingerprint(wrapped.get_base_model()) == fingerprint
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    assert weights_fingerprint(model) != fingerprint


def test_folders_without_a_readable_contract(tmp_path: Path, contract: Contract) -> None:
    with pytest.raises(ContractError, match="not a decoder trained by this library"):
        Contract.load(tmp_path)
    (tmp_path / CONTRACT_NAME).write_text("{}")
    with pytest.raises(ContractError, match="is not a contract"):
        Contract.load(tmp_path)
    values = json.loads(contract.save(tmp_path).read_text())
    (tmp_path / CONTRACT_NAME).write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(ContractError, match="Upgrade"):
        Contract.load(tmp_path)
