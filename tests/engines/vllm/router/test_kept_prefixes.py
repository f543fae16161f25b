"""What the router thinks that a replica keeps."""

from __future__ import annotations

from prefillshare_train.engines.vllm.router.kept_prefixes import KeptPrefixes, whole_block_keys


def keys(*tokens: int, salt: str | None = None) -> list[str]:
    return whole_block_keys(tokens, 2, salt)


def test_whole_blocks_from_the_beginning() -> None:
    kept = KeptPrefixes(8)
    kept.note(keys(1, 2, 3, 4, 5))
    assert kept.match(keys(1, 2, 3, 4, 5, 6)) == 2
    assert kept.match(keys(1, 2, 9, 9)) == 1
    assert kept.match(keys(3, 4)) == 0
    assert kept.match(keys(1, 2, salt="s")) == 0
    assert kept.match(()) == 0


def test_a_gap_ends_the_match() -> None:
    kept = KeptPrefixes(8)
    kept.note(keys(1, 2, 3, 4)[1:])
    assert kept.match(keys(1, 2, 3, 4)) == 0


def test_it_is_bounded_and_loses_ends_of_old_prompts_first() -> None:
    kept = KeptPrefixes(4)
    kept.note(keys(1, 1, 2, 2, 3, 3))
    kept.note(keys(9, 9, 8, 8))
    assert len(kept) == 4
    assert kept.match(keys(1, 1, 2, 2, 3, 3)) == 2
    kept.note(keys(1, 1))
    kept.note(keys(7, 7, 7, 7))
    assert kept.match(keys(1, 1)) == 1
    assert kept.match(keys(9, 9)) == 1


def test_forgetting() -> None:
    kept = KeptPrefixes(4)
    kept.note(keys(1, 1))
    kept.forget()
    assert kept.match(keys(1, 1)) == 0
