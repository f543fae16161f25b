"""A PEFT model with its adapters off is its base, and nothing of it has changed afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tests.core import families
from torch import Tensor

from prefillshare_train.core import adapters_off as module
from prefillshare_train.core.adapters_off import adapters_off
from prefillshare_train.core.forward import causal_lm_of

IDS = torch.arange(2, 12)[None]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "saved modules": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"],
        init_lora_weights=False,
    ),
    "token rows": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4], init_lora_weights=False
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
}  # fmt: skip


def made(name: str) -> PeftModel:
    base = families.build("llama", torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model  # type: ignore[return-value]


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return causal_lm_of(model)(IDS).logits


def flags(model: PeftModel) -> Any:
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {name: getattr(m, "disable_adapters", None) for name, m in model.named_modules()},
    )


@pytest.mark.parametrize("through_forward", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_base(name: str, through_forward: bool) -> None:
    model = made(name).train()
    model.get_base_model().model.layers[0].eval()
    expected = families.build("llama", torch.float32)(IDS).logits
    adapted, before = logits(model), flags(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with adapters_off(model, through_forward=through_forward):
        torch.testing.assert_close(logits(model), expected)
        assert not any(m.training for m in model.modules())
    assert flags(model) == before
    assert torch.equal(logits(model), adapted)


def test_adapters_that_were_off_stay_off() -> None:
    model = made("lora")
    with model.disable_adapter():
        before = flags(model)[2]
        with adapters_off(model):
            pass
        assert flags(model)[2] == before


def test_only_layers_that_read_a_flag_are_switched_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = module._peft_disabled
    monkeypatch.setattr(module, "_peft_disabled", lambda *a: asked.append(a) or plain(*a))
    for name in CONFIGS:
        with adapters_off(made(name)):
            pass
    assert len(asked) == 1, "ia3 alone is left to PEFT"


def test_adapters_that_would_run_unseen_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("lora").train()
    before = flags(model)
    with monkeypatch.context() as patch:
        patch.setattr(BaseTunerLayer, "disable_adapters", False)
        with pytest.raises(RuntimeError, match="would fill the base's cache"), adapters_off(model):
            pass
    assert flags(model) == before
