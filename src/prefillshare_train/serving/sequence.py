"""The life of one request inside the engine."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from prefillshare_train.serving.api import EventSink, GenerationRequest, Usage
from prefillshare_train.serving.detokenizer import Detokenizer
from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.lane import DecodeRow, Piece
from prefillshare_train.serving.models import ServedDecoder
from prefillshare_train.serving.prefix_cache import Key
from prefillshare_train.serving.sampling import TokenPicker
from prefillshare_train.serving.sessions import SessionKey, Turn


class State(enum.Enum):
    """Where a request is."""

    WAITING = enum.auto()  # for blocks, or for a prefill of the same prefix
    PREFILLING = enum.auto()  # the base runs its prompt
    READY = enum.auto()  # for a decoding row
    STARTING = enum.auto()  # its decoder runs its own part of the prompt
    DECODING = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """A request with its blocks.

    Attributes:
        request: what was asked.
        decoder: who answers.
        base_tokens: prompt tokens that the base supplies.
        root: key that its blocks descend from.
        part: which part of its session it belongs to (see `sessions.Part`); `turn`: its turn there,
            once it is admitted.
        expected: prompt tokens that were kept when last looked for.
        worker: number of the prefill worker that holds its prompt.
        blocks: blocks of the base's K/V; the first `computed` tokens are in place.
        own_blocks: private blocks of the decoder's K/V; the first `own_tokens` tokens are in place.
        cached: prompt tokens that were found.
        scheduled: prompt tokens handed to the worker, in place or on their way.
        parent: key of the last whole block committed.
        committed: prompt tokens up to there.
    """

    request: GenerationRequest
    decoder: ServedDecoder
    base_tokens: int
    root: Key
    sink: EventSink
    picker: TokenPicker
    detokenizer: Detokenizer
    part: str = ""
    turn: Turn | None = None
    state: State = State.WAITING
    worker: int = -1
    blocks: list[int] = field(default_factory=list)
    own_blocks: list[int] = field(default_factory=list)
    expected: int = 0
    cached: int = 0
    computed: int = 0
    scheduled: int = 0
    parent: Key = b""
    committed: int = 0
    own_tokens: int = 0
    response: list[int] = field(default_factory=list)
    cancelled: bool = False
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def session(self) -> SessionKey | None:
        """The session it belongs to."""
        name = self.request.session
        return None if name is None else (self.request.cache_salt, name)

    @property
    def base_ids(self) -> tuple[int, ...]:
        """Prompt tokens that the base supplies."""
        return self.request.prompt_ids[: self.base_tokens]

    @property
    def own_capacity(self) -> int:
        """Most K/V the decoder will hold of its own: its prompt tokens, and all but the last of
        the response's, which nothing follows."""
        own_prompt = len(self.request.prompt_ids) - self.base_tokens
        return own_prompt + self.request.sampling.max_tokens - 1

    @property
    def remaining(self) -> int:
        """Prompt tokens that the base has still to be given."""
        return self.base_tokens - self.scheduled

    @property
    def own_remaining(self) -> int:
        """Prompt tokens that the decoder has still to run; the last one begins decoding."""
        own_prompt = len(self.request.prompt_ids) - self.base_tokens
        return own_prompt - 1 - self.own_tokens

    def forget_blocks(self) -> None:
        """Back to the state before admission; the blocks have been given back."""
        self.state = State.WAITING
        self.blocks, self.own_blocks = [], []
        self.cached = self.computed = self.scheduled = self.committed = self.own_tokens = 0
        self.worker = -1

    def next_piece(self, storage: KVStorage, count: int) -> Piece:
        """The next `count` prompt tokens for the base."""
        start, end = self.scheduled, self.scheduled + count
        return Piece(
            self.request.prompt_ids[start:end],
            storage.slots(self.blocks, 0, start),
            storage.slots(self.blocks, start, end),
        )

    def next_own_piece(self, storage: KVStorage, count: int) -> Piece:
        """The next `count` prompt tokens for the decoder."""
        start, end = self.own_tokens, self.own_tokens + count
        base_slots = storage.slots(self.blocks, 0, self.base_tokens)
        return Piece(
            self.request.prompt_ids[self.base_tokens + start : self.base_tokens + end],
            base_slots + storage.slots(self.own_blocks, 0, start),
            storage.slots(self.own_blocks, start, end),
        )

    def decode_row(self) -> DecodeRow:
        """The next token to run: the prompt's last, then those of the response."""
        token = self.response[-1] if self.response else self.request.prompt_ids[-1]
        return DecodeRow(
            token,
            self.decoder.adapter,
            self.blocks,
            self.base_tokens,
            self.own_blocks,
            self.own_tokens,
        )

    def usage(self, now: float) -> Usage:
        """What it took until now."""
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached,
            prefilled_tokens=self.computed - self.cached,
            decoder_prompt_tokens=len(self.request.prompt_ids) - self.base_tokens,
            completion_tokens=len(self.response),
            queued_s=started - self.submitted_at,
            ttft_s=None if first is None else first - self.submitted_at,
            total_s=now - self.submitted_at,
            started=self.started_at is not None,
        )
