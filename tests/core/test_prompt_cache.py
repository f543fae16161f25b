"""A recorded cache is cut, joined and cast without touching what was recorded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefillshare_train.core.prompt_cache import PromptCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def filled(lengths: tuple[int, ...], seed: int = 0) -> PromptCache:
    generator = torch.Generator().manual_seed(seed)
    cache = PromptCache(lengths)
    for layer in range(LAYERS):
        key, value = torch.randn(2, 1, HEADS, sum(lengths), WIDTH, generator=generator)
        cache.record(layer, key, value)
    return cache


def prompts(cache: PromptCache) -> list[Tensor]:
    """Each prompt's K and V of all layers, (2 * layers, H_kv, n, D)."""
    stacked = torch.stack([*cache.keys, *cache.values])
    return list(stacked.split(list(cache.lengths), dim=2))


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert [t.shape for t in a] == [t.shape for t in b]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sizes() -> None:
    cache = filled((3, 0, 2))
    assert cache.starts == (0, 3, 3)
    assert cache.tokens == 5
    assert cache.dtype == torch.float32
    assert cache.nbytes == 2 * LAYERS * HEADS * 5 * WIDTH * 4


def test_what_is_recorded_is_a_constant() -> None:
    cache = PromptCache((2,))
    key = torch.randn(1, HEADS, 2, WIDTH, requires_grad=True)
    value = torch.randn(1, HEADS, 2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    cache.record(0, key, value)
    assert not cache.keys[0].requires_grad
    assert not cache.values[0].requires_grad
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.bfloat16


def test_a_layer_that_repeats_is_refused() -> None:
    cache = filled((2,))
    with pytest.raises(RuntimeError, match="layer 0 recorded K/V where layer 2 was expected"):
        cache.record(0, torch.zeros(1, HEADS, 2, WIDTH), torch.zeros(1, HEADS, 2, WIDTH))


@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=5), data=st.data())
def test_select_takes_prompts_in_any_order_and_cuts_them(
    order: list[int], data: st.DataObject
) -> None:
    cache = filled((3, 0, 5))
    cuts = [data.draw(st.integers(0, cache.lengths[p])) for p in order]
    held = prompts(cache)
    assert_same(prompts(cache.select(order)), [held[p] for p in order])
    cut = cache.select(order, cuts)
    assert cut.lengths == tuple(cuts)
    assert_same(prompts(cut), [held[p][:, :, :n] for p, n in zip(order, cuts, strict=True)])


def test_a_cut_longer_than_what_was_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 1 has 2 recorded tokens; 3 asked for"):
        filled((4, 2)).select([1], [3])


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
def test_extended_joins_each_prompt_with_its_own(pairs: list[tuple[int, int]]) -> None:
    old, new = filled(tuple(n for n, _ in pairs)), filled(tuple(m for _, m in pairs), seed=1)
    expected = [torch.cat([a, b], dim=2) for a, b in zip(prompts(old), prompts(new), strict=True)]
    before = [t.clone() for t in (*old.keys, *old.values)]
    assert_same(prompts(old.extended(new)), expected)
    assert_same([*old.keys, *old.values], before)


def test_extending_another_number_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot extend 2 prompts with K/V of 1"):
        filled((1, 2)).extended(filled((3,)))


def test_a_cast_keeps_the_original_and_costs_nothing_where_nothing_differs() -> None:
    cache = filled((3, 2))
    narrow = cache.to(torch.bfloat16)
    assert (narrow.lengths, narrow.dtype, cache.dtype) == (
        (3, 2),
        torch.bfloat16,
        torch.float32,
    )
    assert_same(narrow.keys, [k.to(torch.bfloat16) for k in cache.keys])
    same = cache.to(torch.float32)
    assert all(a is b for a, b in zip(same.keys, cache.keys, strict=True))
