"""Equivalences that must hold whatever the model: DESIGN's free oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tests.core import families
from tests.core.conversations import (
    gradients_of,
    multi_turns,
    packed_logits,
    packed_loss,
    prefill_batch,
    single_turns,
)

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation

LAST = BoundaryRule.parse("last_token")


def test_a_decoder_equal_to_its_base_has_the_ordinary_sft_loss() -> None:
    base = families.build("llama")
    rows = multi_turns()
    batch = pack(rows, LAST)
    loss = packed_loss(base, batch, prefill_batch(PrefillModule(base), batch))
    reference = families.reference_copy(base)
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = reference(torch.tensor([row.token_ids])).logits[0]
        for turn in row.turns:
            expected += F.cross_entropy(
                logits[turn.prompt_length - 1 : turn.end - 1],
                torch.tensor(row.token_ids[turn.prompt_length : turn.end]),
                reduction="sum",
            )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_all_turns_in_one_step_equal_one_example_a_turn(family: str) -> None:
    base = families.build(family)
    decoder = families.perturbed(base)
    prefill = PrefillModule(base)
    rows = multi_turns()
    together = pack(rows, LAST)
    loss = packed_loss(decoder, together, prefill_batch(prefill, together))
    loss.backward()
    found = gradients_of(decoder)
    decoder.zero_grad()
    total = 0.0
    for row in rows:
        for turn in row.turns:
            batch = pack([Conversation(row.token_ids, (turn,))], LAST)
            part = packed_loss(decoder, batch, prefill_batch(prefill, batch))
            part.backward()
            total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-13)
    for name, expected in gradients_of(decoder).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturbing_one_conversation_leaves_the_others_bitwise_unchanged(
    dtype: torch.dtype,
) -> None:
    base = families.build("llama", dtype)
    decoder = families.perturbed(base)
    prefill = PrefillModule(base)
    rows = single_turns()
    ids = list(rows[2].token_ids)
    changed = [*rows]
    changed[2] = Conversation(tuple((i + 1) % families.VOCAB for i in ids), rows[2].turns)
    logits = []
    for batch_rows in (rows, changed):
        batch = pack(batch_rows, LAST)
        logits.append(packed_logits(decoder, batch, prefill_batch(prefill, batch)))
    same = (logits[0] == logits[1]).all(dim=-1)
    count = rows[2].response_tokens
    assert int((~same).sum()) == count, "exactly the perturbed conversation's logits move"


def test_nothing_is_padded() -> None:
    rows = [*single_turns(), *multi_turns()]
    batch = pack(rows, LAST)
    ran = batch["prefill_ids"].numel() + batch["input_ids"].numel()
    prompts = sum(max(t.prompt_length - 1 for t in row.turns) for row in rows)
    decoded = sum(t.end - t.prompt_length for row in rows for t in row.turns)
    assert ran == prompts + decoded


def test_lora_with_last_token_is_peft_alora_at_the_last_prompt_token() -> None:
    """An aLoRA acts from its invocation tokens on; ours from the boundary on."""
    trigger = families.VOCAB - 1
    prompt, answer = [5, 9, 3, 7, 11, 4, trigger], [8, 2, 6, 1]
    ids = (*prompt, *answer)
    row = single_turns()[0]
    row = Conversation(ids, (type(row.turns[0])(len(prompt), len(ids), 1),))
    options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    base = families.build("llama", torch.float32)
    alora_base = families.reference_copy(base)
    torch.manual_seed(2)
    ours = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(2)
    alora = get_peft_model(
        alora_base,
        LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[trigger], **options),
    )
    batch = pack([row], LAST)
    cache = prefill_batch(PrefillModule(ours), batch)
    logits = packed_logits(ours, batch, cache)
    whole = alora(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    packed_loss(ours, batch, cache).backward()
    F.cross_entropy(whole, torch.tensor(answer), reduction="sum").backward()
    expected = gradients_of(alora)
    for name, gradient in gradients_of(ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5)


def test_a_bfloat16_base_serves_a_float32_decoder() -> None:
    base = families.build("llama", torch.bfloat16)
    decoder = families.build("llama", torch.float32)
    batch = pack(single_turns(), LAST)
    cache = prefill_batch(PrefillModule(base), batch)
    assert cache.dtype == torch.bfloat16
    loss = packed_loss(decoder, batch, cache)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in gradients_of(decoder).values())
