"""Calls to the instances, and what can go wrong with one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, Literal

import httpx

from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.replicas import Replica
from prefillshare_train.engines.vllm.router.wire import (
    Piece,
    Prefilled,
    WireError,
    error_message,
    read_piece,
    read_prefilled,
)
from prefillshare_train.serving.event_stream import event_data

_PATH = "/v1/completions"
# Below vLLM's own 5 s: a connection that it closes as a request is sent looks like a dead instance.
_KEEP_ALIVE_S = 2.0
_MAX_MESSAGE = 300
_INVALID = frozenset({400, 413, 422})
_FINAL = frozenset({401, 403, 404})

Failure = Literal["dead", "timeout", "failed", "refused", "invalid"]


class UpstreamError(Exception):
    """A call to an instance has failed.

    Attributes:
        replica: which one.
        failure: `dead`: the connection failed or broke. `timeout`: nothing came in time. `failed`:
            it answered with an error that another try may not meet. `refused`: it would refuse
            this request again. `invalid`: any instance would, for what the client asked.
    """

    def __init__(self, replica: Replica, failure: Failure, message: str) -> None:
        super().__init__(f"{replica.address}: {message}")
        self.replica = replica
        self.failure: Failure = failure


class Upstream:
    """One HTTP client for all instances; an async context manager.

    Whoever stops waiting closes the connection, at which vLLM aborts the request.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        key = config.upstream_api_key
        self.client = httpx.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
            timeout=httpx.Timeout(config.prefill_timeout_s, connect=config.connect_timeout_s),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None,
                keepalive_expiry=_KEEP_ALIVE_S,
            ),
            # Instances are inside; a proxy that is meant for the world outside would not find them.
            trust_env=False,
        )

    async def __aenter__(self) -> Upstream:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.client.__aexit__(*exc)

    async def prefill(self, replica: Replica, body: dict[str, Any], request_id: str) -> Prefilled:
        """Run a prompt at the base.

        Raises:
            UpstreamError: it has not been run, or what it left cannot be used.
        """
        try:
            answer = await self.client.post(
                replica.address + _PATH, json=body, headers={"X-Request-Id": request_id}
            )
        except httpx.HTTPError as error:
            raise _broken(replica, error) from error
        _check(replica, answer.status_code, answer.content)
        try:
            return read_prefilled(_json(answer.content), self._config.handover)
        except WireError as error:
            raise UpstreamError(replica, "refused", str(error)) from error

    async def decode(
        self, replica: Replica, body: dict[str, Any], request_id: str
    ) -> AsyncGenerator[Piece]:
        """Stream a response.

        Raises:
            UpstreamError: it was refused, failed, or has ended without a finish reason.
        """
        call = self.client.stream(
            "POST",
            replica.address + _PATH,
            json=body,
            headers={"X-Request-Id": request_id},
            timeout=httpx.Timeout(
                self._config.token_timeout_s, connect=self._config.connect_timeout_s
            ),
        )
        finished = False
        try:
            async with call as answer:
                if answer.status_code != 200:
                    _check(replica, answer.status_code, await answer.aread())
                async for data in event_data(answer.aiter_bytes()):
                    piece = self._piece(replica, data, body.get("logprobs"))
                    if piece is not None:
                        finished = finished or piece.finish_reason is not None
                        yield piece
        except httpx.HTTPError as error:
            if not finished:
                raise _broken(replica, error) from error
        if not finished:
            raise UpstreamError(replica, "failed", "the stream ended without a finish reason")

    def _piece(self, replica: Replica, data: str, logprobs: int | None) -> Piece | None:
        chunk = _json(data)
        if (message := error_message(chunk)) is not None:
            raise UpstreamError(replica, "failed", message[:_MAX_MESSAGE])
        try:
            piece = read_piece(chunk, logprobs)
        except WireError as error:
            raise UpstreamError(replica, "refused", str(error)) from error
        if piece is not None and piece.finish_reason in ("abort", "error"):
            raise UpstreamError(replica, "failed", f"the instance ended it: {piece.finish_reason}")
        return piece


def _check(replica: Replica, status: int, content: bytes) -> None:
    if status == 200:
        return
    message = error_message(_json(content)) or content.decode(errors="replace")
    failure: Failure = "failed"
    if status in _INVALID:
        failure = "invalid"
    elif status in _FINAL:
        failure = "refused"
    raise UpstreamError(replica, failure, f"HTTP {status}: {message[:_MAX_MESSAGE]}")


def _broken(replica: Replica, error: httpx.HTTPError) -> UpstreamError:
    slow = isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout)
    message = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
    return UpstreamError(replica, "timeout" if slow else "dead", message)


def _json(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
