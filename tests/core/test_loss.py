"""The chunked loss equals plain cross-entropy, in value and gradients."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core import families
from tests.core.conversations import packed_order, packed_step, reference_step, single_turns
from torch import nn

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.loss import LogitTransform, LossSums, linear_cross_entropy
from prefillshare_train.core.modules import PrefillModule

VOCAB, WIDTH, TOKENS = 50, 12, 23
ITS_CHUNK = TOKENS * WIDTH // VOCAB  # of Liger's kernel


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


def test_no_gradient_is_computed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = case()
    expected = linear_cross_entropy(hidden, head, labels).nll

    def refused(*_: Any) -> None:
        raise AssertionError("a gradient was computed that nobody asked for")

    monkeypatch.setattr(torch, "mm", refused)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, head, labels).nll == expected


def test_hidden_states_without_gradient_leave_the_heads() -> None:
    hidden, head, labels = case()
    linear_cross_entropy(hidden.detach(), head, labels, chunk_tokens=5).nll.backward()
    found = head.weight.grad
    head.weight.grad = None
    F.cross_entropy(head(hidden), labels, reduction="sum").backward()
    torch.testing.assert_close(found, head.weight.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "modules_to_save"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_adapter_on_the_head(family: str, options: dict[str, Any]) -> None:
    rule, rows = BoundaryRule.parse("last_token"), single_turns()
    base = families.build(family)
    reference_base = families.reference_copy(base)
    reference = families.with_lora(families.reference_copy(base), **options)
    decoder = families.with_lora(base, **options)
    nll, _, gradients, _ = packed_step(PrefillModule(decoder), decoder, rows, rule)
    expected = reference_step(reference_base, reference, packed_order(rows), rule)
    torch.testing.assert_close(nll, expected[0], rtol=1e-11, atol=0)
    assert gradients.keys() == expected[2].keys()
    assert any("lm_head" in name for name in gradients)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10)


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


@pytest.fixture
def liger_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for liger_kernel that notes what it is asked."""
    calls: list[dict[str, Any]] = []

    class Loss:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
            calls[-1]["arguments"] = arguments
            return torch.tensor(7.0)

    package = ModuleType("liger_kernel.transformers")
    package.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    return calls


def test_liger_is_asked_on_cuda_only(liger_calls: list[dict[str, Any]]) -> None:
    hidden, head, labels = case(torch.float32)
    transform = LogitTransform(softcap=5.0)
    linear_cross_entropy(hidden, head, labels, transform, chunk_tokens=ITS_CHUNK)
    assert not liger_calls
    sums = linear_cross_entropy(
        hidden.as_subclass(OnCuda), head, labels, transform, chunk_tokens=ITS_CHUNK
    )
    assert sums == LossSums(torch.tensor(7.0))
    (call,) = liger_calls
    assert (call["reduction"], call["softcap"]) == ("sum", 5.0)
    assert [a.shape for a in call["arguments"]] == [head.weight.shape, hidden.shape, labels.shape]


def test_liger_is_left_out_where_it_cannot_do_it(liger_calls: list[dict[str, Any]]) -> None:
    hidden, head, labels = case(torch.float32)
    on_cuda = hidden.as_subclass(OnCuda)
    chunk = {"chunk_tokens": ITS_CHUNK}
    expected = linear_cross_entropy(hidden, head, labels).nll.item()
    counted = linear_cross_entropy(on_cuda, head, labels, count_correct=True, **chunk)
    assert counted.nll.item() == pytest.approx(expected, rel=1e-6)
    linear_cross_entropy(on_cuda, head, labels, LogitTransform(scale=0.5), **chunk)
    linear_cross_entropy(on_cuda, head, labels, chunk_tokens=ITS_CHUNK + 1)  # its own is smaller
    wide, head, labels = case(torch.float64)
    linear_cross_entropy(wide.as_subclass(OnCuda), head, labels, **chunk)
    assert not liger_calls
