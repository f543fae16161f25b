"""One pull a prefill: tickets that the base's instance keeps, and claims that decoders make.

NIXL reads are one-sided: the base does not see a read before it has ended, and stock vLLM lets a
decoder read blocks that were freed and given to another prompt since, without an error. So a
decoder claims the prefill that it was sent to before it reads, and again after: the base grants
claims of one claimer only, for the very prompt that it prefilled, and none once it lets go of the
blocks. What was granted before and after a read was whole all the while.

Nothing here imports vLLM.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CLAIM_MESSAGE = b"prefillshare-claim:"
"""What a claim begins with on the socket that also serves NIXL's handshake."""


def prompt_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 of a prompt's token ids, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class Claim:
    """A decoder's wish to read the K/V of one prefill.

    Attributes:
        prefill: the base's id of the request.
        claimer: instance and request that want to read; all their claims are one.
        prompt: `prompt_digest` of the decoder's prompt.
        blocks: ids of the base's blocks that it was told, a list for each group.
    """

    prefill: str
    claimer: str
    prompt: str
    blocks: list[list[int]]

    def encode(self) -> bytes:
        """As it goes over the socket."""
        return CLAIM_MESSAGE + json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Claim:
        """Read what `encode` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(**json.loads(message.removeprefix(CLAIM_MESSAGE)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a claim: {error}") from None


@dataclass(frozen=True)
class Grant:
    """The base's answer.

    Attributes:
        refusal: why not; empty where the claim is granted.
    """

    refusal: str = ""

    def encode(self) -> bytes:
        """As it goes over the socket."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Grant:
        """Read what `encode` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(**json.loads(message))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not an answer to a claim: {error}") from None


@dataclass
class _Ticket:
    prompt: str
    blocks: list[list[int]]
    claimer: str | None = None


class TicketBook:
    """The prefills whose K/V wait to be read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: dict[str, _Ticket] = {}

    def issue(self, prefill: str, prompt: str, blocks: Any) -> None:
        """Let a finished prefill be read.

        Args:
            blocks: its block ids, a sequence for each group.
        """
        ticket = _Ticket(prompt, [list(group) for group in blocks])
        with self._lock:
            self._tickets[prefill] = ticket

    def withdraw(self, prefill: str) -> None:
        """Grant nothing any more. To be called before the blocks can be given to another prompt."""
        with self._lock:
            self._tickets.pop(prefill, None)

    def answer(self, claim: Claim) -> Grant:
        """Grant a claim, or say why not."""
        with self._lock:
            ticket = self._tickets.get(claim.prefill)
            if ticket is None:
                return Grant(
                    "its K/V are not held here: they were read already, their time is up, or this "
                    "instance was started since. Prefill again"
                )
            if ticket.claimer not in (None, claim.claimer):
                return Grant(
                    f"its K/V were handed to {ticket.claimer}; each prefill is good for one "
                    "decode. Prefill again"
                )
            if claim.prompt != ticket.prompt:
                return Grant(
                    "another prompt was prefilled: the token ids of the two requests differ"
                )
            if claim.blocks != ticket.blocks:
                return Grant("remote_block_ids are not those of this prefill")
            ticket.claimer = claim.claimer
            return Grant()
