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


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> TicketBook:
    made = TicketBook(clock)
    made.issue("p-1", prompt_digest(PROMPT), ([3, 4],), until=130.0)
    return made


def test_a_prefill_is_granted_once_with_the_time_that_is_left(
    book: TicketBook, clock: Clock
) -> None:
    clock.now = 110.0
    assert book.answer(CLAIM) == Grant(seconds=20.0)
    second = book.answer(replace(CLAIM, claimer="d-2/r-9"))
    assert "handed to d-1/r-1" in second.refusal
    assert second.seconds == 0


def test_a_claim_whose_answer_was_lost_can_be_repeated(book: TicketBook) -> None:
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


def test_nothing_is_granted_after_the_time(book: TicketBook, clock: Clock) -> None:
    clock.now = 130.0
    assert "is up" in book.answer(CLAIM).refusal


def test_of_many_at_once_one_is_granted(book: TicketBook) -> None:
    claims = [replace(CLAIM, claimer=f"d/{i}") for i in range(64)]
    with ThreadPoolExecutor(16) as pool:
        grants = list(pool.map(book.answer, claims))
    assert sum(not grant.refusal for grant in grants) == 1


def test_claims_and_grants_survive_the_wire() -> None:
    assert Claim.decode(CLAIM.encode()) == CLAIM
    for grant in (Grant(seconds=2.5), Grant(refusal="no")):
        assert Grant.decode(grant.encode()) == grant


@pytest.mark.parametrize("message", [b"", b"[]", b"{}", b'{"prefill": "x"}', b"\xff", b"3"])
def test_what_is_no_claim_is_a_value_error(message: bytes) -> None:
    with pytest.raises(ValueError, match="not a claim"):
        Claim.decode(b"prefillshare-claim:" + message)


def test_digests_tell_prompts_apart() -> None:
    assert prompt_digest([1, 23]) != prompt_digest([12, 3])
    assert prompt_digest([1, 2]) == prompt_digest((1, 2))
