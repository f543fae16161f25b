"""The chunked loss equals plain cross-entropy, in value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prefillshare_train.core.loss import LogitTransform, linear_cross_entropy

VOCAB, WIDTH, TOKENS = 50, 12, 23


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype)
    return hidden, head, torch.randint(0, VOCAB, (TOKENS,))


@pytest.mark.parametrize("chunk", [1, 7, 23, 256])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(0.5, 3.0)], ids=str
)
def test_value_and_gradients(chunk: int, transform: LogitTransform) -> None:
    hidden, head, labels = case()
    sums = linear_cross_entropy(
        hidden, head, labels, transform, chunk_tokens=chunk, count_correct=True
    )
    (sums.nll * 0.3).backward()
    found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = transform(head(hidden))
    expected = F.cross_entropy(logits, labels, reduction="sum")
    (expected * 0.3).backward()
    torch.testing.assert_close(sums.nll, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], head.weight.grad, rtol=1e-10, atol=1e-13)
    assert int(sums.correct) == int((logits.argmax(-1) == labels).sum())  # type: ignore[arg-type]


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do() -> None:
    hidden, head, labels = case()
    head.requires_grad_(False)
    linear_cross_entropy(hidden, head, labels).nll.backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0


def test_a_head_with_a_bias_takes_the_checkpointed_route() -> None:
    hidden, _, labels = case()
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    sums = linear_cross_entropy(hidden, head, labels, chunk_tokens=5, count_correct=True)
    sums.nll.backward()
    found = hidden.grad, head.bias.grad
    hidden.grad = head.bias.grad = None
    logits = head(hidden)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(sums.nll, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], hidden.grad)
    torch.testing.assert_close(found[1], head.bias.grad)
    assert int(sums.correct) == int((logits.argmax(-1) == labels).sum())  # type: ignore[arg-type]


def test_bfloat16_is_summed_in_float32() -> None:
    hidden, head, labels = case(torch.bfloat16)
    sums = linear_cross_entropy(hidden, head, labels, chunk_tokens=4)
    assert sums.nll.dtype == torch.float32
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    assert sums.nll.item() == pytest.approx(expected.item(), rel=1e-5)
    sums.nll.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.bfloat16
