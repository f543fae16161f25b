"""The base's rows in a batch with adapters, under vLLM's LoRA for CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefillshare_train.engines.vllm import base_rows

SLOTS = torch.tensor([10.0, 20.0, 30.0])
BY_TOKENS, BY_SAMPLES = "token_lora_indices", "sampler_indices"
METHODS = {
    "add_lora_linear": BY_TOKENS,
    "add_lora_embedding": BY_TOKENS,
    "add_lora_logits": BY_SAMPLES,
    "apply_lora_full_linear": BY_SAMPLES,
}


@pytest.fixture
def wrapper() -> Any:
    """Looks adapters up as vLLM's does: an index of -1 picks the last slot."""

    class Wrapper:
        def __init__(self, tokens: list[int], samples: list[int]) -> None:
            self.token_lora_indices = torch.tensor(tokens)
            self.sampler_indices = torch.tensor(samples)

        def _tokens(self, y: torch.Tensor, x: torch.Tensor) -> None:
            y.view(-1, y.shape[-1]).add_(SLOTS[self.token_lora_indices][: len(x), None])

        def _samples(self, y: torch.Tensor, x: torch.Tensor) -> None:
            y.view(-1, y.shape[-1]).add_(SLOTS[self.sampler_indices][: len(x), None])

        add_lora_linear = add_lora_embedding = _tokens
        add_lora_logits = apply_lora_full_linear = _samples

    return Wrapper


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4)])
def test_rows_without_an_adapter_stay(wrapper: Any, method: str, shape: tuple[int, ...]) -> None:
    rows, others = [-1, 0, 2], [0, 0, 0]
    lists = (rows, others) if METHODS[method] == BY_TOKENS else (others, rows)
    y = torch.ones(shape)
    getattr(wrapper(*lists), method)(y, torch.zeros(3, 4))
    assert y.flatten(1)[:, 0].tolist() == [31.0, 11.0, 31.0], "the fault itself"
    for _ in range(2):
        base_rows.protect(wrapper)
        y = torch.ones(shape)
        getattr(wrapper(*lists), method)(y, torch.zeros(3, 4))
        assert y.flatten(1)[:, 0].tolist() == [1.0, 11.0, 31.0]


def test_indices_of_a_longer_batch_are_cut(wrapper: Any) -> None:
    base_rows.protect(wrapper)
    y = torch.ones(2, 4)
    wrapper([0, -1, 1], [0]).add_lora_linear(y, torch.zeros(2, 4))
    assert y[:, 0].tolist() == [11.0, 1.0]
