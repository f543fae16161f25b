"""One response: a prefill at the base, a decode at the decoder, and another try where one fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.kept_prefixes import whole_block_keys
from prefillshare_train.engines.vllm.router.metrics import RouterMetrics
from prefillshare_train.engines.vllm.router.replicas import Fleet, Replica
from prefillshare_train.engines.vllm.router.upstream import Upstream, UpstreamError
from prefillshare_train.engines.vllm.router.wire import (
    Piece,
    Prefilled,
    Ticket,
    decode_body,
    prefill_body,
)
from prefillshare_train.serving.api import (
    Event,
    EventSink,
    FinishReason,
    GenerationRequest,
    Usage,
)

_LOG = logging.getLogger(__name__)
_LOOK_AGAIN_S = 0.05


class _NoReplicaError(Exception):
    """No replica takes the request."""


@dataclass(frozen=True)
class Shared:
    """What all responses share.

    Attributes:
        end_token_ids: that end a response, as the decoders were trained.
    """

    config: RouterConfig
    fleet: Fleet
    upstream: Upstream
    metrics: RouterMetrics
    end_token_ids: Sequence[int]


class Answer:
    """Runs one request and tells its events; `run` never raises.

    Attributes:
        state: what it is at.
        prefill_s: time in prefill calls so far.

    Args:
        base_tokens: prompt tokens that the base supplies.
        sink: gets the events, the last one with a finish reason and the usage.
    """

    def __init__(
        self, shared: Shared, request: GenerationRequest, base_tokens: int, sink: EventSink
    ) -> None:
        self._shared = shared
        self._request = request
        self._base_tokens = base_tokens
        self._sink = sink
        config = shared.config
        pool = config.decoders[request.decoder]
        self._model = pool.model or request.decoder
        self._keys = whole_block_keys(request.prompt_ids, config.block_tokens, request.cache_salt)
        self._submitted = time.monotonic()
        self._prefill_began: float | None = None
        self._first_token: float | None = None
        self._cached = 0
        self._count = 0
        self._tried: set[str] = set()
        self.state = "waiting"
        self.prefill_s = 0.0
        self.usage: Usage | None = None

    async def run(self) -> None:
        """Answer the request. A cancelled task ends it as `cancelled`."""
        try:
            await self._until_answered()
        except asyncio.CancelledError:
            self.give_up()
        except (UpstreamError, _NoReplicaError) as error:
            _LOG.warning("%s: %s", self._request.request_id, error)
            at_fault = isinstance(error, UpstreamError) and error.failure == "invalid"
            self._end("error", error=str(error), invalid=at_fault)
        except Exception:
            _LOG.exception("%s failed", self._request.request_id)
            self._end("error", error="internal error of the router")

    def give_up(self) -> None:
        """Tell that it was cancelled, unless it has ended."""
        self._end("cancelled")

    async def _until_answered(self) -> None:
        shared, request = self._shared, self._request
        for attempt in range(1, shared.config.max_attempts + 1):
            try:
                await self._try(f"{request.request_id}-{attempt}")
            except UpstreamError as error:
                if self.usage is not None:  # the answer was complete before
                    return
                self._note(error)
                last = attempt == shared.config.max_attempts
                final = error.failure in ("refused", "invalid")
                # Tokens that are out cannot be taken back, and another try might go on otherwise.
                if final or self._count or last:
                    raise
                shared.metrics.retries.labels(request.decoder, error.failure).inc()
                _LOG.info("%s: try %d failed: %s", request.request_id, attempt, error)
            else:
                return

    async def _try(self, request_id: str) -> None:
        """One prefill and one decode: what a prefill leaves is never used twice."""
        request = self._request
        prefill, decode = await self._choose()
        # Held from here on, so that requests that come meanwhile see what is on its way there.
        with decode.busy(len(request.prompt_ids)):
            prefilled = await self._prefill(prefill, request_id)
            self.state = "decoding"
            await self._decode(decode, prefilled.ticket, request_id)

    async def _prefill(self, replica: Replica, request_id: str) -> Prefilled:
        shared, request = self._shared, self._request
        self.state = "prefilling"
        began = time.monotonic()
        self._prefill_began = self._prefill_began or began
        expected = replica.kept.match(self._keys) * shared.config.block_tokens
        # Noted as it is sent: the next request for the same prefix finds it there, or on its way.
        replica.kept.note(self._keys)
        body = prefill_body(request, shared.config.base_model, shared.config.handover)
        try:
            with replica.busy(len(request.prompt_ids) - expected):
                prefilled = await shared.upstream.prefill(replica, body, request_id)
        finally:
            self.prefill_s += time.monotonic() - began
        self._cached = min(prefilled.cached_tokens or 0, self._base_tokens)
        metrics, address = shared.metrics, replica.address
        metrics.prefill_seconds.labels(address).observe(time.monotonic() - began)
        metrics.expected_cached.labels(address).inc(expected)
        metrics.cached.labels(address).inc(prefilled.cached_tokens or 0)
        return prefilled

    async def _decode(self, replica: Replica, ticket: Ticket | None, request_id: str) -> None:
        shared, request = self._shared, self._request
        body = decode_body(request, self._model, shared.end_token_ids, ticket)
        began = time.monotonic()
        async with contextlib.aclosing(shared.upstream.decode(replica, body, request_id)) as pieces:
            async for piece in pieces:
                if piece.shared_tokens is not None:
                    self._check_sharing(replica, piece.shared_tokens)
                    continue
                if piece.token_ids and self._first_token is None:
                    self._first_token = time.monotonic()
                    shared.metrics.first_token_seconds.labels(
                        request.decoder, replica.address
                    ).observe(self._first_token - began)
                self._tell(piece)

    async def _choose(self) -> tuple[Replica, Replica]:
        """Both replicas before the prefill: its K/V must not wait for a decoder to come up."""
        shared, request = self._shared, self._request
        # One that has just failed may be back after its next health check.
        patience = shared.config.health_interval_s + shared.config.health_timeout_s
        deadline = time.monotonic() + patience
        while True:
            prefill = shared.fleet.choose_prefill(
                self._keys, self._base_tokens, request.session, self._tried
            )
            own_pool = bool(shared.fleet.pools[request.decoder])
            decode = (
                shared.fleet.choose_decode(request.decoder, self._tried) if own_pool else prefill
            )
            if prefill is not None and decode is not None:
                return prefill, decode
            if time.monotonic() >= deadline:
                raise _NoReplicaError(shared.fleet.why_not(request.decoder) or "no replica is up")
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _note(self, error: UpstreamError) -> None:
        self._tried.add(error.replica.address)
        self._shared.metrics.failures.labels(error.replica.address, error.failure).inc()
        if error.failure == "dead":
            error.replica.lost(str(error))

    def _tell(self, piece: Piece) -> None:
        self._count += len(piece.token_ids)
        if piece.finish_reason is None:
            event = Event(self._request.request_id, piece.token_ids, piece.text, piece.logprobs)
            self._sink(event)
            return
        stop_reason = piece.stop_reason
        ends = self._shared.end_token_ids
        if stop_reason in ends and stop_reason not in self._request.sampling.stop_token_ids:
            stop_reason = None
        self._end("length" if piece.finish_reason == "length" else "stop", piece, stop_reason)

    def _end(
        self,
        reason: FinishReason,
        piece: Piece | None = None,
        stop_reason: str | int | None = None,
        *,
        error: str | None = None,
        invalid: bool = False,
    ) -> None:
        if self.usage is not None:
            return
        self.state = "ended"
        self.usage = self._usage()
        piece = piece or Piece()
        self._sink(
            Event(
                self._request.request_id,
                piece.token_ids,
                piece.text,
                piece.logprobs,
                reason,
                stop_reason,
                error,
                self.usage,
                invalid,
            )
        )

    def _usage(self) -> Usage:
        now = time.monotonic()
        prompt = len(self._request.prompt_ids)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=self._cached,
            prefilled_tokens=self._base_tokens - self._cached,
            decoder_prompt_tokens=prompt - self._base_tokens,
            completion_tokens=self._count,
            queued_s=(self._prefill_began or now) - self._submitted,
            ttft_s=None if self._first_token is None else self._first_token - self._submitted,
            total_s=now - self._submitted,
        )

    def _check_sharing(self, replica: Replica, shared_tokens: int) -> None:
        missing = self._base_tokens - shared_tokens
        if missing > 0:
            self._shared.metrics.unshared.labels(self._request.decoder).inc(missing)
            _LOG.warning(
                "%s: decoder %s at %s ran %d prompt tokens itself that the base should have run",
                self._request.request_id,
                self._request.decoder,
                replica.address,
                missing,
            )
