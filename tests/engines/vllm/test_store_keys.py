"""Keys: equal where K/V are equal, and different wherever they could differ."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefillshare_train.engines.vllm.store_keys import block_keys

_TOKENS = st.lists(st.integers(0, 200_000), max_size=40)


def test_one_key_a_block_the_partial_one_included() -> None:
    assert [len(block_keys("n", range(n), 4)) for n in (0, 1, 3, 4, 5, 8)] == [0, 1, 1, 1, 2, 2]


@given(_TOKENS, _TOKENS, st.integers(1, 7))
def test_keys_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int], size: int) -> None:
    def agree(index: int) -> bool:
        end = (index + 1) * size
        return a[:end] == b[:end]

    pairs = zip(block_keys("n", a, size), block_keys("n", b, size), strict=False)
    assert all((one == other) == agree(index) for index, (one, other) in enumerate(pairs))


def test_namespace_and_salt_are_part_of_every_key() -> None:
    tokens = list(range(10))
    variants = [
        block_keys("n", tokens, 4),
        block_keys("m", tokens, 4),
        block_keys("n", tokens, 4, "s"),
        block_keys("n", tokens, 4, "t"),
        block_keys("n\ns", tokens, 4),
    ]
    assert len({key for keys in variants for key in keys}) == 5 * 3
    assert block_keys("n", tokens, 4, "") == block_keys("n", tokens, 4)
