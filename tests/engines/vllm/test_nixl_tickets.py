"""One read a prefill: what the base grants, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from prefillshare_train.engines.vllm.nixl_tickets import (
    Claim,
    Grant,
    TicketBook,
    prompt_digest,
)

PROMPT = [5, 6, 7]
CLAIM = Claim(prefill="p-1", claimer="d-1/r-1", prompt=prompt_digest(PROMPT), blocks=[[3, 4]])


@pytest.fixture
def book() -> TicketBook:
    made = TicketBook()
    made.issue("p-1", prompt_digest(PROMPT), ([3, 4],))
    return made


def test_a_prefill_is_granted_to_one(book: TicketBook) -> None:
    assert book.answer(CLAIM) == Grant()
    second = book.answer(replace(CLAIM, claimer="d-2/r-9"))
    assert "handed to d-1/r-1" in second.refusal


def test_a_read_that_the_blocks_did_not_outlast_is_seen_by_its_second_claim(
    book: TicketBook,
) -> None:
    assert not book.answer(CLAIM).refusal
    book.withdraw("p-1")
    assert "not held here" in book.answer(CLAIM).refusal


def test_the_same_claimer_is_granted_again(book: TicketBook) -> None:
    assert not book.answer(CLAIM).refusal
    assert not book.answer(CLAIM).refusal


def test_another_prompt_of_the_same_length_gets_nothing(book: TicketBook) -> None:
    other = replace(CLAIM, prompt=prompt_digest([5, 6, 8]))
    assert "another prompt" in book.answer(other).refusal
    assert not book.answer(CLAIM).refusal  # the refused one has not used it up


def test_other_blocks_get_nothing(book: TicketBook) -> None:
    assert "remote_block_ids" in book.answer(replace(CLAIM, blocks=[[3, 5]])).refusal


def test_nothing_is_granted_once_the_blocks_are_free(book: TicketBook) -> None:
    book.withdraw("p-1")
    assert "not held here" in book.answer(CLAIM).refusal
    book.withdraw("p-1")  # unknown ones are no error


def test_of_many_at_once_one_is_granted(book: TicketBook) -> None:
    claims = [replace(CLAIM, claimer=f"d/{i}") for i in range(64)]
    with ThreadPoolExecutor(16) as pool:
        grants = list(pool.map(book.answer, claims))
    assert sum(not grant.refusal for grant in grants) == 1


def test_claims_and_grants_survive_the_wire() -> None:
    assert Claim.decode(CLAIM.encode()) == CLAIM
    for grant in (Grant(), Grant(refusal="no")):
        assert Grant.decode(grant.encode()) == grant


@pytest.mark.parametrize("message", [b"", b"[]", b"{}", b'{"prefill": "x"}', b"\xff", b"3"])
def test_what_is_no_claim_is_a_value_error(message: bytes) -> None:
    with pytest.raises(ValueError, match="not a claim"):
        Claim.decode(b"prefillshare-claim:" + message)


def test_digests_tell_prompts_apart() -> None:
    assert prompt_digest([1, 23]) != prompt_digest([12, 3])
    assert prompt_digest([1, 2]) == prompt_digest((1, 2))
