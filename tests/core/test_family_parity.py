"""Every proven family against a plain reference: loss, logits and every gradient, in float64.

The reference is transformers itself, one turn at a time: the base runs the prompt prefix and
leaves its own K/V cache, the decoder is run on the rest with that cache, under transformers' own
attention, masks and windows. Nothing of this library takes part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from peft import PeftModel
from tests.core import families
from tests.core.conversations import (
    RULES,
    multi_turns,
    packed_order,
    packed_step,
    reference_step,
    single_turns,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefillshare_train.core import kernels
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.families import PROVEN
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.core.spans import Conversation

BATCHES = {"single_turn": single_turns(), "multi_turn": multi_turns()}
_LORA_FAMILIES = ("llama", "gemma3_text", "phi3", "gpt_oss", "qwen3_moe")


@dataclass
class Pair:
    """A base and a decoder whose weights differ, and the same two for the reference."""

    base: PrefillModule
    decoder: nn.Module
    reference_base: PreTrainedModel
    reference_decoder: nn.Module


@cache
def full_pair(family: str) -> Pair:
    base = families.build(family)
    decoder = families.perturbed(base)
    references = families.reference_copy(base), families.reference_copy(decoder)
    return Pair(PrefillModule(base), decoder, *references)


@cache
def lora_pair(family: str) -> Pair:
    """One copy of the weights for base and decoder; two plain ones for the reference."""
    base = families.build(family)
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj"]
    reference_base = families.reference_copy(base)
    reference = families.with_lora(families.reference_copy(base), target_modules=targets)
    decoder = families.with_lora(base, target_modules=targets)
    return Pair(PrefillModule(decoder), decoder, reference_base, reference)


def assert_equal_steps(
    pair: Pair, conversations: Sequence[Conversation], rule_text: str
) -> dict[str, Tensor]:
    """Compare our step with the reference's; our gradients."""
    rule = BoundaryRule.parse(rule_text)
    nll, logits, gradients, labels = packed_step(pair.base, pair.decoder, conversations, rule)
    expected_nll, expected_logits, expected_gradients, expected_labels = reference_step(
        pair.reference_base, pair.reference_decoder, packed_order(conversations), rule
    )
    assert labels.tolist() == expected_labels.tolist()
    torch.testing.assert_close(nll, expected_nll, rtol=1e-11, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-11)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    return gradients


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if on:
        model.train()  # transformers checkpoints only in training mode
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.eval()
        inner.gradient_checkpointing_disable()


def test_every_proven_family_is_tested_and_no_other() -> None:
    assert {make().model_type for make in families.CONFIGS.values()} == PROVEN


def test_tied_and_untied_embeddings_both_appear() -> None:
    assert {make().tie_word_embeddings for make in families.CONFIGS.values()} == {True, False}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_packed_step_equals_one_turn_at_a_time(family: str, kind: str, rule: str) -> None:
    gradients = assert_equal_steps(full_pair(family), BATCHES[kind], rule)
    silent = [name for name, g in gradients.items() if not g.abs().max() > 1e-6]
    assert not silent, "a gradient that is zero proves nothing"


@pytest.mark.parametrize("rule", ["last_token", "ratio:0"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_route_that_accelerators_take(
    family: str, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_attend_blocks", kernels._attend_sdpa)
    assert_equal_steps(full_pair(family), BATCHES[kind], rule)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_checkpointing_changes_no_gradient(family: str, kind: str) -> None:
    pair, rule = full_pair(family), BoundaryRule.parse("last_token")
    plain = packed_step(pair.base, pair.decoder, BATCHES[kind], rule)
    # Layers are checkpointed inside their own call, so their hooks miss the replay; their
    # attention's do not.
    layers = [m.self_attn for m in pair.decoder.modules() if hasattr(m, "self_attn")]
    runs: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda m, _: runs.append(m)) for layer in layers]
    switch_checkpointing(pair.decoder, True)
    try:
        replayed = packed_step(pair.base, pair.decoder, BATCHES[kind], rule)
    finally:
        switch_checkpointing(pair.decoder, False)
        for hook in hooks:
            hook.remove()
    # packed_step runs each layer for the loss, once more in its replay, and once for the logits.
    assert len(runs) == 3 * len(layers), "checkpointing did not replay the layers"
    assert torch.equal(plain[0], replayed[0])
    for name, gradient in plain[2].items():
        torch.testing.assert_close(replayed[2][name], gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("rule", ["last_token", "generation_prompt", "ratio:0"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", _LORA_FAMILIES)
def test_a_lora_decoder_that_shares_the_bases_weights(
    family: str, kind: str, rule: str, checkpointing: bool
) -> None:
    pair = lora_pair(family)
    switch_checkpointing(pair.decoder, checkpointing)
    try:
        gradients = assert_equal_steps(pair, BATCHES[kind], rule)
    finally:
        switch_checkpointing(pair.decoder, False)
    assert all("lora_" in name for name in gradients)
    assert all(g.abs().max() > 1e-6 for g in gradients.values())
