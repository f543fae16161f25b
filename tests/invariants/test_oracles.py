"""Equivalences that must hold whatever the model: DESIGN's free oracles."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from tests.core import families
from tests.core.conversations import (
    gradients_of,
    multi_turns,
    packed_logits,
    packed_loss,
    packed_order,
    prefill_batch,
    single_turns,
)

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import PrefillModule, empty_cache
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation, Turn

LAST = BoundaryRule.parse("last_token")


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("rule", ["last_token", "generation_prompt", "ratio:0.5"])
def test_a_decoder_equal_to_its_base_has_the_ordinary_sft_loss(family: str, rule: str) -> None:
    base = families.build(family)
    rows = multi_turns()
    batch = pack(rows, BoundaryRule.parse(rule))
    loss = packed_loss(base, batch, prefill_batch(PrefillModule(base), batch))
    expected = sft_loss(families.reference_copy(base), rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def sft_loss(model: torch.nn.Module, rows: Sequence[Conversation]) -> torch.Tensor:
    """Summed next-token loss on response tokens, one ordinary forward a conversation."""
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(torch.tensor([row.token_ids])).logits[0]
        for turn in row.turns:
            expected += F.cross_entropy(
                logits[turn.prompt_length - 1 : turn.end - 1],
                torch.tensor(row.token_ids[turn.prompt_length : turn.end]),
                reduction="sum",
            )
    return expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_full_prompt_is_ordinary_sft(family: str) -> None:
    model = families.build(family)
    reference = families.reference_copy(model)
    rows = [*single_turns(), *multi_turns()]
    batch = pack(rows, LAST, "full_prompt")
    cache = empty_cache(batch["layout"].prompt_lengths, model)
    loss = packed_loss(model, batch, cache)
    expected = sft_loss(reference, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    found = gradients_of(model)
    for name, gradient in gradients_of(reference).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_turns_in_one_step_equal_one_example_a_turn(family: str) -> None:
    base = families.build(family)
    decoder = families.perturbed(base)
    prefill = PrefillModule(base)
    rows = multi_turns()
    together = pack(rows, LAST)
    loss = packed_loss(decoder, together, prefill_batch(prefill, together))
    loss.backward()
    found = gradients_of(decoder)
    with torch.no_grad():
        logits = packed_logits(decoder, together, prefill_batch(prefill, together))
    decoder.zero_grad()
    total, parts = 0.0, []
    for row in packed_order(rows):
        for turn in row.turns:
            batch = pack([Conversation(row.token_ids, (turn,))], LAST)
            cache = prefill_batch(prefill, batch)
            part = packed_loss(decoder, batch, cache)
            part.backward()
            total += part.item()
            with torch.no_grad():
                parts.append(packed_logits(decoder, batch, cache))
    torch.testing.assert_close(logits, torch.cat(parts), rtol=1e-11, atol=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-13)
    for name, expected in gradients_of(decoder).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_perturbing_one_conversation_leaves_the_others_bitwise_unchanged(
    family: str, dtype: torch.dtype
) -> None:
    base = families.build(family, dtype)
    decoder = families.perturbed(base)
    prefill = PrefillModule(base)
    # Equal shapes beside each other (one attention call for both), and several turns.
    rows = packed_order([*single_turns(), *multi_turns()])

    def logits_of(rows: Sequence[Conversation]) -> torch.Tensor:
        batch = pack(rows, LAST)
        assert packed_order(rows) == rows, "the same layout whatever the tokens"
        with torch.no_grad():
            return packed_logits(decoder, batch, prefill_batch(prefill, batch))

    before, start = logits_of(rows), 0
    for place, row in enumerate(rows):
        shifted = tuple((i + 1) % families.VOCAB for i in row.token_ids)
        changed = [*rows]
        changed[place] = Conversation(shifted, row.turns)
        same = (before == logits_of(changed)).all(dim=-1)
        own = torch.zeros_like(same)
        own[start : start + row.response_tokens] = True
        start += row.response_tokens
        assert torch.equal(same, ~own), "exactly the perturbed conversation's logits move"


def test_nothing_is_padded() -> None:
    rows = [*single_turns(), *multi_turns()]
    batch = pack(rows, LAST)
    ran = batch["prefill_ids"].numel() + batch["input_ids"].numel()
    prompts = sum(max(t.prompt_length - 1 for t in row.turns) for row in rows)
    decoded = sum(t.end - t.prompt_length for row in rows for t in row.turns)
    assert ran == prompts + decoded


@pytest.mark.parametrize(
    ("dtype", "logit_error", "gradient_error"),
    [(torch.float32, 2e-6, 2e-5), (torch.float64, 1e-12, 1e-11)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("draw", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3_moe"])
def test_lora_with_last_token_is_peft_alora_at_the_last_prompt_token(
    family: str, draw: int, dtype: torch.dtype, logit_error: float, gradient_error: float
) -> None:
    """An aLoRA acts from its invocation tokens on; ours from the boundary on.

    Errors are relative to the largest logit and to each gradient's largest element. They are half
    of the bounds in these draws; draw 0 of mistral rounds to 2.07e-6 on an Intel Xeon, in float32.
    """
    trigger = families.VOCAB - 1
    generator = torch.Generator().manual_seed(draw)
    drawn = torch.randint(0, trigger, (2 * families.WINDOW + 9,), generator=generator).tolist()
    prompt, answer = [*drawn[:-9], trigger], drawn[-9:]
    ids = (*prompt, *answer)
    row = Conversation(ids, (Turn(len(prompt), len(ids)),))
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    base = families.build(family, dtype)
    alora_base = families.reference_copy(base)
    ours = families.with_lora(base, **options)
    alora = families.with_lora(alora_base, alora_invocation_tokens=[trigger], **options)
    batch = pack([row], LAST)
    cache = prefill_batch(PrefillModule(ours), batch)
    logits = packed_logits(ours, batch, cache)
    tokens = torch.tensor([ids])
    whole = alora(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
    scale = whole.abs().max().item()
    torch.testing.assert_close(logits, whole, rtol=0, atol=logit_error * scale)
    plain = ours(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
    assert (plain - whole).abs().max() > 1e-2 * scale, "a plain LoRA is something else"
    packed_loss(ours, batch, cache).backward()
    F.cross_entropy(whole, torch.tensor(answer), reduction="sum").backward()
    expected = gradients_of(alora)
    found = gradients_of(ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-5
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=gradient_error * largest)


def test_a_bfloat16_base_serves_a_float32_decoder() -> None:
    base = families.build("llama", torch.bfloat16)
    decoder = families.build("llama", torch.float32)
    batch = pack(single_turns(), LAST)
    cache = prefill_batch(PrefillModule(base), batch)
    assert cache.dtype == torch.bfloat16
    loss = packed_loss(decoder, batch, cache)
    assert torch.equal(loss, packed_loss(decoder, batch, cache.to(torch.float32)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in gradients_of(decoder).values())
