"""Prefill leaves every flag as it was and is deterministic; refusals name the reason."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.core import families
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.families import UnsupportedModelError, check_supported, position_limit
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import (
    PrefillModule,
    attach_loss_head,
    check_positions,
    load_causal_lm,
)
from prefillshare_train.core.prompt_cache import PromptCache

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


def unknown(**fields: Any) -> PreTrainedConfig:
    """A configuration of an architecture that nobody has heard of."""
    config = PreTrainedConfig(**fields)
    config.model_type = "novelty"
    return config


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


def test_a_full_copy_as_base_is_frozen_and_in_eval_mode() -> None:
    base = families.build("llama", torch.float32).train()
    PrefillModule(base)
    assert not any(p.requires_grad for p in base.parameters())
    assert not any(m.training for m in base.modules())


def test_an_error_in_the_base_leaves_the_flags_as_they_were() -> None:
    model = families.with_lora(families.build("llama", torch.float32)).train()
    modes = {n: m.training for n, m in model.named_modules()}
    gradients = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(IndexError):
        PrefillModule(model).prefill([[families.VOCAB + 1]])
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == gradients
    ids = torch.tensor(PROMPTS[:1])
    with_adapter = model.eval()(input_ids=ids).logits
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=ids).logits, with_adapter)


def test_prompts_with_nothing_new_keep_their_cache() -> None:
    prefill = PrefillModule(families.build("mistral", torch.float64))
    past = prefill.prefill(PROMPTS)
    before = [t.clone() for t in (*past.keys, *past.values)]
    one = prefill.prefill([[9, 9], []], past)
    assert one.lengths == (7, 3)
    whole = prefill.prefill([[*PROMPTS[0], 9, 9], PROMPTS[1]])
    for a, b in zip((*one.keys, *one.values), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert equal(prefill.prefill([[], []], past), past)
    assert all(torch.equal(a, b) for a, b in zip(before, (*past.keys, *past.values), strict=True))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_empty_cache_has_the_shape_of_a_recorded_one(family: str) -> None:
    prefill = PrefillModule(families.build(family, torch.float32))
    empty, one = prefill.prefill([[], []]), prefill.prefill([[1], []])
    assert len(empty.keys) == len(one.keys)
    for a, b in zip((*empty.keys, *empty.values), (*one.keys, *one.values), strict=True):
        assert (a.shape[0], a.shape[1], a.shape[2], a.dtype) == (
            b.shape[0],
            0,
            b.shape[2],
            b.dtype,
        )


def test_a_deep_copy_with_a_loss_head_runs_its_own_weights() -> None:
    model = families.build("llama", torch.float32)
    attach_loss_head(model)
    attach_loss_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    ids = torch.tensor(PROMPTS[:1])
    assert not other(input_ids=ids).logits.any()
    assert model(input_ids=ids).logits.any()


def test_stopping_early_changes_nothing() -> None:
    base = families.build("qwen3", torch.float32)
    early, whole = PrefillModule(base), PrefillModule(base, stop_early=False)
    assert equal(early.prefill(PROMPTS), whole.prefill(PROMPTS))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3NextConfig(), "recurrent state"),
        (MambaConfig(), "recurrent state"),
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), "latent attention"),
        (Gemma2Config(), "soft-caps"),
        (Gemma3Config(), "multimodal"),
        (Llama4TextConfig(), "chunked attention"),
        (Gemma3nTextConfig(), "another layer's K/V"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "soft-caps"),
        (unknown(layer_types=["linear_attention", "full_attention"]), "linear_attention"),
        (unknown(kv_lora_rank=8), "latent attention"),
        (unknown(), "no parity test"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_is_not_proven_is_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        check_supported(config)
    assert repr(config.model_type) in str(error.value)


def test_unsupported_models_are_refused_before_they_are_used() -> None:
    config = Gemma2Config(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, pad_token_id=None,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="soft-caps"):
        PrefillModule(AutoModelForCausalLM.from_config(config))
    with pytest.raises(TypeError, match="found Linear"):
        PrefillModule(torch.nn.Linear(2, 2))


def test_length_dependent_rope_has_a_limit() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert position_limit(config) == 64
    check_positions(config, 63)
    with pytest.raises(ValueError, match=r"data\.max_length to 64"):
        check_positions(config, 64)
    assert position_limit(LlamaConfig()) is None
    halves = [1.0] * 48
    longrope = {"rope_type": "longrope", "short_factor": halves, "long_factor": halves,
                "rope_theta": 10000.0, "original_max_position_embeddings": 4096}  # fmt: skip
    assert position_limit(Phi3Config(rope_parameters=longrope)) == 4096
    per_layer_type = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {**rope, "original_max_position_embeddings": 32},
    }
    assert position_limit(Gemma3TextConfig(rope_parameters=per_layer_type)) == 32


def test_a_prompt_past_the_rope_limit_is_refused() -> None:
    base = families.build("llama_dynamic_rope", torch.float32)
    prefill = PrefillModule(base)
    prefill.prefill([[1] * 80])
    with pytest.raises(ValueError, match="position 80 is past 80"):
        prefill.prefill([[1] * 81])


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
    assert BoundaryRule.parse("ratio:0.29").base_length(100) == 29
    assert BoundaryRule.parse("ratio:1").base_length(10) == 9
    assert BoundaryRule.parse("block_aligned:16").base_length(32) == 16
    for text in ("last_token", "generation_prompt", "block_aligned:4", "ratio:0.25", "ratio:1/3"):
        assert str(BoundaryRule.parse(text)) == text
    for text in ("", "block_aligned:0", "ratio:1.5", "ratio:x", "last_token:2", "block_aligned"):
        with pytest.raises(ValueError, match="is not one of"):
            BoundaryRule.parse(text)
    with pytest.raises(ValueError, match="generation_prompt needs"):
        BoundaryRule.parse("generation_prompt").base_length(5, 0)


@given(st.fractions(0, 1), st.integers(1, 500))
def test_any_ratio_survives_being_written_down(ratio: Fraction, length: int) -> None:
    rule = BoundaryRule.parse(f"ratio:{ratio}")
    assert BoundaryRule.parse(str(rule)) == rule
    held = rule.base_length(length)
    assert held == length - 1 or held <= ratio * length < held + 1
