"""The block pool and the prefix cache, without a model."""

from __future__ import annotations

import pytest
import torch

from prefillshare_train.serving.block_pool import BlockPool, NoBlocksError
from prefillshare_train.serving.in_flight import InFlight
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.prefix_cache import PrefixCache, block_key, root_key

ROOT = root_key("base", "float32", None)
GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32)


def cache_of(blocks: int, staged: int = 0) -> PrefixCache:
    storage = KVStorage(GEOMETRY, blocks, 4)
    return PrefixCache(storage, range(blocks), staged * storage.block_bytes)


def fill(cache: PrefixCache, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Take blocks for a prompt, write recognisable K/V, commit them, and give them back."""
    match = cache.match(root, tokens)
    blocks, _ = cache.acquire(match, len(tokens), 0)
    parent = match.parent
    for start in range(len(match.full) * 4, len(tokens), 4):
        block = blocks[start // 4]
        part = tokens[start : start + 4]
        for i, token in enumerate(part):
            cache.storage.memory[:, :, block, i] = float(token)
        parent = cache.commit(parent, part, block)
    cache.pool.release(blocks)
    return blocks


def contents(cache: PrefixCache, blocks: list[int], count: int) -> list[int]:
    slots = cache.storage.slots(blocks, 0, count)
    return cache.storage.keys[1][slots, 0, 0].tolist()


def test_roots_differ_by_everything_that_must_not_be_shared() -> None:
    roots = {
        root_key("a", "float32", None),
        root_key("b", "float32", None),
        root_key("a", "bfloat16", None),
        root_key("a", "float32", "tenant"),
        root_key("a", "float32", None, "math"),
        root_key("a", "float32", "math", None),
    }
    assert len(roots) == 6


def test_a_key_names_the_whole_prompt() -> None:
    other = block_key(ROOT, [9, 9, 9, 9])
    assert block_key(ROOT, [1, 2]) != block_key(other, [1, 2])
    assert block_key(ROOT, [1, 23]) != block_key(ROOT, [12, 3])


def test_a_prompt_is_found_to_the_token() -> None:
    cache = cache_of(16)
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    for tokens, found in [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 10),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 10),
        ([1, 2, 3, 4, 5, 6, 99], 6),
        ([1, 2], 2),
        ([2, 2, 3, 4], 0),
        ([], 0),
    ]:
        assert cache.match(ROOT, tokens).tokens == found
    assert cache.match(root_key("other", "float32", None), [1, 2, 3, 4]).tokens == 0


def test_a_prompt_that_leaves_inside_a_block_gets_a_copy() -> None:
    cache = cache_of(16)
    first = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    match = cache.match(ROOT, [1, 2, 3, 4, 5, 6, 70, 80, 90])
    blocks, _ = cache.acquire(match, 9, 0)
    assert blocks[0] == first[0]
    assert blocks[1] != first[1]
    assert contents(cache, blocks, 6) == [1, 2, 3, 4, 5, 6]
    assert contents(cache, first, 8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_oldest_go_first_and_a_prompt_loses_its_end_before_its_beginning() -> None:
    cache = cache_of(6)
    fill(cache, [1] * 12)
    fill(cache, [2] * 12)
    cache.pool.allocate(2)
    assert cache.match(ROOT, [1] * 12).tokens == 4
    assert cache.match(ROOT, [2] * 12).tokens == 12
    assert cache.pool.evicted == 2


def test_held_blocks_are_never_evicted_and_nothing_is_half_taken() -> None:
    cache = cache_of(4)
    fill(cache, [1] * 8)
    match = cache.match(ROOT, [1] * 8 + [2] * 8)
    with pytest.raises(NoBlocksError):
        cache.acquire(match, 16, 1)
    assert cache.pool.available == 4
    blocks, private = cache.acquire(match, 12, 1)
    assert len(set(blocks) | set(private)) == 4
    assert cache.pool.available == 0
    with pytest.raises(NoBlocksError):
        cache.pool.allocate(1)


def test_the_host_tier_keeps_content_and_obeys_its_budget() -> None:
    cache = cache_of(4, staged=3)
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    fill(cache, [11, 12, 13, 14, 15, 16, 17, 18])
    fill(cache, [21, 22, 23, 24, 25, 26, 27, 28])
    assert cache.staged_blocks == 2
    assert cache.match(ROOT, [1, 2, 3, 4, 5, 6, 7, 8]).tokens == 8
    match = cache.match(ROOT, [1, 2, 3, 4, 5, 6, 7, 8])
    blocks, _ = cache.acquire(match, 8, 0)
    assert contents(cache, blocks, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cache.staged_in_bytes == 2 * cache.storage.block_bytes
    assert cache.staged_blocks <= 3
    # The two that made room are staged in turn; a fifth prompt pushes the oldest out.
    cache.pool.release(blocks)
    fill(cache, [31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42])
    assert cache.staged_blocks == 3


def test_the_same_tokens_computed_twice_are_kept_once() -> None:
    cache = cache_of(8)
    empty = cache.match(ROOT, [1, 2, 3, 4])
    first, _ = cache.acquire(empty, 4, 0)
    second, _ = cache.acquire(empty, 4, 0)
    assert cache.commit(ROOT, [1, 2, 3, 4], first[0]) == cache.commit(ROOT, [1, 2, 3, 4], second[0])
    cache.pool.release([*first, *second])
    assert cache.pool.cached == 1
    assert cache.match(ROOT, [1, 2, 3, 4]).full[0].block == first[0]


def test_giving_back_too_often_is_an_error() -> None:
    pool = BlockPool(range(2), lambda block: None)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release(blocks)


def test_a_dropped_cache_finds_nothing_and_frees_what_nobody_holds() -> None:
    cache = cache_of(8)
    fill(cache, [1] * 8)
    match = cache.match(ROOT, [1] * 4)
    held, _ = cache.acquire(match, 4, 0)
    cache.drop_all()
    assert cache.match(ROOT, [1] * 8).tokens == 0
    assert cache.pool.available == 7
    cache.pool.release(held)
    assert cache.pool.available == 8


def test_waiting_for_a_prefix_that_is_being_prefilled() -> None:
    coming = InFlight(4)
    coming.add("a", 0, ROOT, [1, 2, 3, 4, 5, 6])
    second = block_key(ROOT, [1, 2, 3, 4])
    assert coming.worth_waiting(0, ROOT, [1, 2, 3, 4, 9], 0)
    assert coming.worth_waiting(0, ROOT, [1, 2], 0)
    assert coming.worth_waiting(0, second, [5, 6, 7], 0)
    assert not coming.worth_waiting(0, ROOT, [1, 9, 9, 9], 0)
    assert not coming.worth_waiting(0, second, [9], 0)
    # What is in place already is not waited for.
    assert not coming.worth_waiting(0, ROOT, [1, 2, 9, 9], 2)
    assert not coming.worth_waiting(0, ROOT, [1, 2, 3, 9], 2)
    assert coming.worth_waiting(0, ROOT, [1, 2, 3], 2)
    assert not coming.worth_waiting(1, ROOT, [1, 2, 3, 4], 0), "another worker's"
    coming.remove("a")
    assert not coming.worth_waiting(0, ROOT, [1, 2, 3, 4], 0)


def test_how_much_of_a_prompt_is_coming() -> None:
    coming = InFlight(4)
    coming.add("a", 0, ROOT, [1, 2, 3, 4, 5, 6])
    coming.add("b", 0, ROOT, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert coming.coming(0, ROOT, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 9
    assert coming.coming(0, ROOT, [1, 2, 3, 4, 5, 6, 9]) == 6
    assert coming.coming(0, ROOT, [1, 2]) == 2
    assert coming.coming(0, ROOT, [2, 2]) == 0
    assert coming.coming(1, ROOT, [1, 2]) == 0
    coming.remove("b")
    assert coming.coming(0, ROOT, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 6


def test_blocks_that_may_be_read_unwritten_hold_zeros() -> None:
    cache = cache_of(4)
    cache.storage.memory.fill_(float("nan"))
    blocks, private = cache.acquire(cache.match(ROOT, [1] * 6), 6, 1)
    for block in (blocks[-1], *private):
        assert torch.isfinite(cache.storage.memory[:, :, block]).all()
