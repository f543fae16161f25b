"""Which instances the store's connector takes, as they start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.hub import decoders
from transformers import AutoConfig

from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.store_options import StoreOptions
from prefillshare_train.engines.vllm.store_roles import Roles


def instance(model: Path, role: str, *, lora: bool = False) -> Any:
    """What `Roles` reads of vLLM's configuration."""
    config = AutoConfig.from_pretrained(model)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            dtype=torch.float32,
            hf_text_config=config,
            get_total_num_hidden_layers=lambda: config.num_hidden_layers,
            get_total_num_kv_heads=lambda: config.num_key_value_heads,
            get_head_size=lambda: config.head_dim,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=32),
        kv_transfer_config=SimpleNamespace(kv_role=role, is_kv_producer=role != "kv_consumer"),
        lora_config=object() if lora else None,
    )


def test_a_base_and_decoders_of_both_kinds_are_taken(base: Path, tmp_path: Path) -> None:
    full = decoders.save_decoder(tmp_path / "full", base)
    adapter = decoders.save_decoder(tmp_path / "adapter", base, lora={})
    options = StoreOptions(base=str(base))
    assert Roles(instance(base, "kv_producer"), options).boundary(None) is None
    assert Roles(instance(full, "kv_consumer"), options).boundary(None) is not None
    roles = Roles(instance(base, "kv_consumer", lora=True), options)
    assert roles.boundary(str(adapter)) is not None


def test_the_base_under_a_decoders_name_is_refused(base: Path) -> None:
    """It would answer every request with the base's tokens, and count no miss."""
    with pytest.raises(VllmError, match="is this the base's folder"):
        Roles(instance(base, "kv_consumer"), StoreOptions())


def test_a_decoder_that_is_to_write_is_refused(base: Path, tmp_path: Path) -> None:
    full = decoders.save_decoder(tmp_path / "full", base)
    with pytest.raises(VllmError, match="only the base may write"):
        Roles(instance(full, "kv_both"), StoreOptions(base=str(base)))


def test_an_instance_with_another_rope_takes_no_decoder(base: Path, tmp_path: Path) -> None:
    adapter = decoders.save_decoder(tmp_path / "adapter", base, lora={})
    options = StoreOptions(base=str(base), decoders={"one": adapter})
    changed = instance(base, "kv_both", lora=True)
    changed.model_config.hf_text_config.rope_parameters["rope_theta"] *= 2
    with pytest.raises(ContractError, match=r"decoder one.*\n.*rope_parameters"):
        Roles(changed, options)
