"""How many adapters an instance may serve whose base prefills for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm import store_roles
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.prefill_id import Boundary
from prefillshare_train.engines.vllm.store_roles import Roles


@pytest.fixture(autouse=True)
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter's contract fits; the count is what is asked about."""
    fitting = Boundary(BoundaryRule.parse("last_token"))
    monkeypatch.setattr(store_roles, "check_decoder", lambda *_, **__: fitting)
    monkeypatch.setattr(store_roles, "serving_fingerprint", lambda *_: "sha256:1")
    prefill_id = SimpleNamespace(base_fingerprint="sha256:1", cache_dtype="float32")
    monkeypatch.setattr(store_roles.PrefillId, "of", lambda *_: prefill_id)


def roles(slots: int, *decoders: str, device: str = "cpu", producer: bool = True) -> Roles:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="base"),
        kv_transfer_config=SimpleNamespace(is_kv_producer=producer, kv_role="kv_both"),
        lora_config=SimpleNamespace(max_loras=slots),
        device_config=SimpleNamespace(device_type=device),
    )
    options: Any = SimpleNamespace(
        base=None, base_fingerprint=None, decoders={name: Path(name) for name in decoders}
    )
    return Roles(config, options)


def test_vllms_last_slot_stays_empty_on_a_cpu() -> None:
    made = roles(3)
    served = [made.boundary(name) for name in ("math", "code", "math")]
    assert None not in served
    for _ in range(2):
        with pytest.raises(ContractError, match=r"--max-loras is 3.*one more than"):
            made.boundary("tools")
    assert made.boundary("code")


def test_decoders_that_are_named_at_the_start_count() -> None:
    assert roles(3, "math", "code").boundary("math")
    with pytest.raises(VllmError, match="--max-loras is 2"):
        roles(2, "math", "code")


@pytest.mark.parametrize("where", [{"device": "cuda"}, {"producer": False}])
def test_elsewhere_all_slots_are_used(where: dict[str, Any]) -> None:
    assert roles(1, **where).boundary("math")
