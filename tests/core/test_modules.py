"""Prefill leaves every flag as it was and is deterministic; refusals name the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.core import families
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.families import UnsupportedModelError, check_supported, position_limit
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import PrefillModule, check_positions, load_causal_lm
from prefillshare_train.core.prompt_cache import PromptCache

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


def equal(a: PromptCache, b: PromptCache) -> bool:
    pairs = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_shared_bases_flags_are_as_before() -> None:
    model = families.with_lora(families.build("llama", torch.float32))
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    model.train()
    model.get_base_model().model.layers[0].eval()
    gradients = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    PrefillModule(model).prefill(PROMPTS)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == gradients
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not frozen.requires_grad


def test_a_training_decoder_puts_no_dropout_and_no_adapter_into_its_base() -> None:
    base = families.build("llama", torch.float32)
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = PrefillModule(base).prefill(PROMPTS)
    model = families.with_lora(base, lora_dropout=0.5).train()
    prefill = PrefillModule(model)
    assert equal(prefill.prefill(PROMPTS), expected)
    assert equal(prefill.prefill(PROMPTS), expected)


def test_stopping_early_changes_nothing() -> None:
    base = families.build("qwen3", torch.float32)
    early, whole = PrefillModule(base), PrefillModule(base, stop_early=False)
    assert equal(early.prefill(PROMPTS), whole.prefill(PROMPTS))


def test_an_ordinary_forward_still_works_with_left_padding() -> None:
    model = families.build("mistral", torch.float64)
    reference = families.reference_copy(model)
    ids = torch.randint(1, families.VOCAB, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for options in ({"attention_mask": mask}, {}):
        found = model(input_ids=ids, **options).logits[:, 10:]
        expected = reference(input_ids=ids, **options).logits[:, 10:]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3NextConfig(), "recurrent state"),
        (MambaConfig(), "recurrent state"),
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), "latent attention"),
        (Gemma2Config(), "soft-caps"),
        (PreTrainedConfig(), "no parity test"),
    ],
    ids=lambda value: getattr(value, "model_type", "") or None,
)
def test_what_is_not_proven_is_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        check_supported(config)
    assert repr(config.model_type) in str(error.value)


def test_length_dependent_rope_has_a_limit() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert position_limit(config) == 64
    check_positions(config, 63)
    with pytest.raises(ValueError, match=r"data\.max_length to 64"):
        check_positions(config, 64)
    assert position_limit(LlamaConfig()) is None


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    model = families.build("llama", torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(tmp_path))


def test_a_decoder_without_a_contract_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a decoder trained by this library"):
        load_decoder(tmp_path)


def test_layers_out_of_order_are_refused() -> None:
    cache = PromptCache((1,))
    with pytest.raises(RuntimeError, match="layer 1 recorded"):
        cache.record(1, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


@given(
    rule=st.sampled_from(["last_token", "generation_prompt", "block_aligned:16", "ratio:0.7"]),
    length=st.integers(1, 5000),
    header=st.integers(1, 20),
)
def test_the_decoder_always_runs_a_prompt_token(rule: str, length: int, header: int) -> None:
    held = BoundaryRule.parse(rule).base_length(length, min(header, length))
    assert 0 <= held < length


def test_ratios_are_exact_and_rules_are_read_back() -> None:
    assert BoundaryRule.parse("ratio:0.7").base_length(10) == 7
    assert BoundaryRule.parse("ratio:1").base_length(10) == 9
    assert BoundaryRule.parse("block_aligned:16").base_length(32) == 16
    for text in ("last_token", "generation_prompt", "block_aligned:4", "ratio:0.25"):
        assert str(BoundaryRule.parse(text)) == text
    for text in ("", "block_aligned:0", "ratio:1.5", "ratio:x", "last_token:2", "block_aligned"):
        with pytest.raises(ValueError, match="is not one of"):
            BoundaryRule.parse(text)
    with pytest.raises(ValueError, match="generation_prompt needs"):
        BoundaryRule.parse("generation_prompt").base_length(5, 0)
