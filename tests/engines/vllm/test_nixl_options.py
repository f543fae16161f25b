"""What the NIXL connector refuses to run on, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.vllm.deployments import full_decoder

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.nixl_options import NixlOptions, check_role


def instance(
    model: Path,
    role: str,
    *,
    caching: bool = False,
    lora: bool = False,
    policy: str = "fail",
) -> Any:
    """As much of vLLM's configuration as is looked at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model)),
        kv_transfer_config=SimpleNamespace(kv_role=role, kv_load_failure_policy=policy),
        lora_config=object() if lora else None,
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return full_decoder(tmp_path / "decoder")


def test_a_base_and_decoders_of_both_kinds_are_taken(base: Path, decoder: Path) -> None:
    check_role(instance(base, "kv_producer", caching=True))
    check_role(instance(decoder, "kv_consumer"))
    check_role(instance(base, "kv_consumer", lora=True))


def test_a_decoder_that_caches_prefixes_is_refused(base: Path, decoder: Path) -> None:
    with pytest.raises(VllmError, match="--no-enable-prefix-caching"):
        check_role(instance(decoder, "kv_consumer", caching=True))
    with pytest.raises(VllmError, match="--no-enable-prefix-caching"):
        check_role(instance(base, "kv_consumer", lora=True, caching=True))


def test_the_same_folder_on_both_sides_is_refused(base: Path, decoder: Path) -> None:
    with pytest.raises(VllmError, match="is this the base's folder"):
        check_role(instance(base, "kv_consumer"))
    with pytest.raises(VllmError, match="only the base may prefill"):
        check_role(instance(decoder, "kv_producer"))


def test_a_base_with_adapters_is_refused(base: Path) -> None:
    with pytest.raises(VllmError, match="prefills alone"):
        check_role(instance(base, "kv_producer", lora=True))


def test_both_roles_in_one_process_are_the_store_s(base: Path) -> None:
    with pytest.raises(VllmError, match="store connector"):
        check_role(instance(base, "kv_both"))


def test_recomputing_what_does_not_arrive_is_refused(decoder: Path) -> None:
    with pytest.raises(VllmError, match=r"recompute.*its own weights"):
        check_role(instance(decoder, "kv_consumer", policy="recompute"))


def test_options_are_read_and_checked() -> None:
    options = NixlOptions.read({"base": "/models/base", "kv_lease_duration": 60})
    assert (options.base, options.kv_lease_duration) == ("/models/base", 60)
    assert NixlOptions.read({"enforce_handshake_compat": True}) == NixlOptions()
    with pytest.raises(VllmError, match=r"kv_lease_duration: .*greater than or equal to 6"):
        NixlOptions.read({"kv_lease_duration": 1})
    with pytest.raises(VllmError, match=r"bidirectional_kv_xfer.*Its keys are base, "):
        NixlOptions.read({"bidirectional_kv_xfer": True})


def test_the_handshake_cannot_be_switched_off() -> None:
    with pytest.raises(VllmError, match="enforce_handshake_compat is false"):
        NixlOptions.read({"enforce_handshake_compat": False})
