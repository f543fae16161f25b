"""A model loaded with this attention is still an ordinary transformers model."""

from __future__ import annotations

import pytest
import torch
from tests.core import families
from tests.core.conversations import packed_step, single_turns
from torch import nn

from prefillshare_train.core.attention import (
    JOB_KEYWORD,
    AttentionJob,
    LastLayerReached,
    prefillshare_attention,
)
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.layout import Segment, group_segments
from prefillshare_train.core.modules import PrefillModule, attach_loss_head
from prefillshare_train.core.prompt_cache import PromptCache

LENGTH, PADDING = 3 * families.WINDOW, 11


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids and their mask; the first is padded on the left."""
    ids = torch.randint(1, families.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_ordinary_forward_equals_transformers_attention(family: str) -> None:
    model = families.build(family)
    attach_loss_head(model)  # other calls than the trainer's are left alone
    reference = families.reference_copy(families.build(family))
    ids, mask = padded_batch()
    for options in ({}, {"attention_mask": mask}):
        found = model(input_ids=ids, **options).logits
        expected = reference(input_ids=ids, **options).logits
        seen = mask.bool() if options else torch.ones_like(ids).bool()
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_transformers_generates_with_left_padding(family: str) -> None:
    model = families.build(family)
    ids, mask = padded_batch()
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = families.reference_copy(model).generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)


def test_soft_capped_attention_is_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="soft-capping is not supported"):
        prefillshare_attention(nn.Module(), query, query, query, None, softcap=50.0)


def test_scaling_falls_back_to_the_head_dimension() -> None:
    query, key, value = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64)
    output, weights = prefillshare_attention(nn.Module(), query, key, value, None)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


def test_a_job_reaches_every_layer_and_stops_where_it_is_told() -> None:
    model = families.build("llama")
    ids = torch.arange(5)[None]
    groups = group_segments([Segment(5)])
    whole, cut = PromptCache((5,)), PromptCache((5,))
    for record, last in ((whole, None), (cut, 1)):
        job = AttentionJob(groups, record=record, last_layer=last)
        options = {"position_ids": ids, "use_cache": False, JOB_KEYWORD: job}
        if last is None:
            model(input_ids=ids, **options)
        else:
            with pytest.raises(LastLayerReached):
                model(input_ids=ids, **options)
    assert len(whole.keys) == 3
    assert len(cut.keys) == 2
    assert torch.equal(whole.keys[1], cut.keys[1])


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_attention_dropout_acts_in_training_only_and_replays_under_checkpointing(
    family: str,
) -> None:
    base = families.build(family)
    decoder = families.perturbed(base)
    for module in decoder.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.4
    prefill, rule = PrefillModule(base), BoundaryRule.parse("last_token")

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        nll, _, gradients, _ = packed_step(prefill, decoder, single_turns(), rule)
        return nll, gradients

    still, _ = step()
    decoder.train()
    dropped, gradients = step()
    assert not torch.equal(still, dropped)
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    replayed, replayed_gradients = step()
    assert torch.equal(replayed, dropped)
    for name, gradient in gradients.items():
        torch.testing.assert_close(replayed_gradients[name], gradient, rtol=1e-12, atol=1e-13)
