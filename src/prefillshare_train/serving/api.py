"""What goes into the engine and what comes out: requests, events, results, statistics, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prefillshare_train.data import Renderer

FinishReason = Literal["stop", "length", "cancelled", "error"]
_REQUEST_NUMBERS = itertools.count()


class ServingError(ValueError):
    """The engine cannot be set up as asked, or a request can never be served."""


class QueueFullError(RuntimeError):
    """The waiting queue is full.

    Attributes:
        retry_after_s: seconds after which a place is likely to be free, from the rate of late.
    """

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineStoppedError(RuntimeError):
    """The engine drains or has stopped, and takes no more requests."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked and when a response ends.

    Attributes:
        max_tokens: the longest response, the token that ends it included.
        temperature: 0 is greedy.
        top_p: nucleus probability in (0, 1].
        top_k: most likely tokens to draw from; 0 for all.
        min_p: least probability, relative to the most likely token's.
        repetition_penalty: 1 for none (transformers' `RepetitionPenaltyLogitsProcessor`).
        seed: of this response's own generator; drawn afresh where None.
        stop: strings that end a response; they are left out of its text.
        stop_token_ids: further token ids that end it.
        ignore_eos: go on to `max_tokens` (fixed lengths, for benchmarks).
        logprobs: alternatives to report for each token, 0 for the chosen one's alone; None for no
            log-probabilities. They are of the raw logits, before temperature and cuts.

    Raises:
        ServingError: a value is out of its range; the message names it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
            "stop": (all(self.stop), "without empty strings"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                raise ServingError(f"{name} must be {allowed}, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class GenerationRequest:
    """One response to be generated.

    Attributes:
        decoder: name of a served decoder.
        prompt_ids: token ids of the whole prompt.
        sampling: see `SamplingParams`.
        header_length: tokens of the assistant header at the prompt's end, for decoders whose
            boundary rule is `generation_prompt`.
        session: name of the agent session this turn belongs to; None for a request on its own.
            Sessions of different salts are different ones, whatever their names.
        end_session: the session's last request: its reservation ends with it.
        cache_salt: tenants with different salts never share a block.
        request_id: unique name.
    """

    decoder: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    header_length: int = 0
    session: str | None = None
    end_session: bool = False
    cache_salt: str | None = None
    request_id: str = field(default_factory=lambda: f"request-{next(_REQUEST_NUMBERS)}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request took.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        cached_tokens: prompt tokens whose K/V were found.
        prefilled_tokens: prompt tokens that the base ran for this request.
        decoder_prompt_tokens: prompt tokens that the decoder runs itself (h of the boundary rule).
        completion_tokens: response tokens, the one that ended it included.
        queued_s: from submission until its prefill could begin.
        ttft_s: from submission to the first response token; None where there was none.
        total_s: from submission to the end.
        started: whether it ever left the queue; of what did not, nothing was looked up or run.
    """

    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    decoder_prompt_tokens: int
    completion_tokens: int
    queued_s: float
    ttft_s: float | None
    total_s: float
    started: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """One token, or the end, of a response.

    Attributes:
        request_id: whose.
        token_ids: the new tokens; empty in an end that brings none.
        text: text that is certain now (held back while it may be part of a stop string or of an
            unfinished character). The texts of all events together are the response.
        logprobs: one entry a token where asked for.
        finish_reason: set in the last event: `stop` (a stop token or string), `length`,
            `cancelled`, or `error` (see `error`).
        stop_reason: the stop string, or the stop token's id, that ended it; None for EOS.
        error: what went wrong, for people.
        usage: set in the last event.
        invalid: the error lies in what was asked for; asking again brings it again.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    usage: Usage | None = None
    invalid: bool = False


EventSink = Callable[[Event], None]
"""Called in the engine's thread for every event, in order; must return at once."""


@dataclass(frozen=True)
class Generation:
    """A whole response, collected."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    error: str | None
    usage: Usage

    @classmethod
    def of(cls, events: list[Event]) -> Generation:
        """Join the events of one response, the last one included."""
        last = events[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return cls(
            last.request_id,
            tuple(token for event in events for token in event.token_ids),
            "".join(event.text for event in events),
            tuple(entry for event in events for entry in event.logprobs),
            last.finish_reason,
            last.stop_reason,
            last.error,
            last.usage,
        )


@dataclass(frozen=True)
class EngineStats:
    """Counters since start, and gauges of now.

    Attributes:
        waiting, prefilling, decoding: requests in each state.
        sessions: sessions that hold a reservation; `sessions_waiting`: that wait for one.
        blocks_total, blocks_used, blocks_cached: of the pool: all; held by requests or sessions;
            unreferenced but findable.
        block_tokens: tokens in a block; `block_bytes`: bytes of one.
        peak_kv_bytes: most bytes that held or findable blocks took at once.
        staged_blocks: blocks in the host tier now.
        staged_out_bytes, staged_in_bytes: moved to and from the host tier so far.
        evicted_blocks: findable blocks given up for room.
        prompt_tokens, cached_tokens, prefilled_tokens, completion_tokens: sums over requests.
        retokenized_misses: turns whose session had generated other ids for the same place.
        prefill_seconds, decode_seconds: time spent in forward passes over prompts, the decoders'
            own parts of them included, and over responses.
        handover_seconds: from the end of prefill passes until the engine's process knew of them,
            summed over `prefill_batches`.
        decode_steps, decode_rows: passes, and rows summed over them.
        finished: requests ended, by finish reason.
        workers_alive, workers_total: prefill workers.
    """

    waiting: int
    prefilling: int
    decoding: int
    sessions: int
    sessions_waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    block_tokens: int
    block_bytes: int
    peak_kv_bytes: int
    staged_blocks: int
    staged_out_bytes: int
    staged_in_bytes: int
    evicted_blocks: int
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    retokenized_misses: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    decode_rows: int
    finished: dict[str, int]
    workers_alive: int
    workers_total: int
    prefill_batches: int = 0
    handover_seconds: float = 0.0


class EngineClient(Protocol):
    """What servers and workloads use of an engine; all of it may be called from any thread."""

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the served decoders."""
        ...

    @property
    def renderer(self) -> Renderer:
        """Makes prompts as the decoders were trained on, and decodes token ids."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that can ever be served with one response token."""
        ...

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request; its events go to `sink` until one has a finish reason.

        Raises:
            ServingError: it can never be served (unknown decoder, empty or too long prompt).
            QueueFullError: the queue is full.
            EngineStoppedError: the engine drains or has stopped.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request within one step and free its blocks; unknown or ended ones are ignored."""
        ...

    def end_session(self, session: str) -> None:
        """Give up a session's reservation, under every salt; unknown ones are ignored."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        ...
