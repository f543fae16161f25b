"""The responses that one HTTP request waits for: from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.types import Receive

from prefillshare_train.serving.api import (
    EngineClient,
    Event,
    EventSink,
    Generation,
    GenerationRequest,
)
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.metrics import ServerMetrics

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection before its response was complete."""


class RunningResponses:
    """Submits requests and brings their events; a context that cancels what still runs at its end.

    Args:
        requests: one a choice, in the order of the choices.
    """

    def __init__(
        self, engine: EngineClient, metrics: ServerMetrics, requests: Sequence[GenerationRequest]
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._requests = list(requests)
        self._live: set[str] = set()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> RunningResponses:
        """Submit all; none is left running where one is refused.

        Raises:
            ServingError, QueueFullError, EngineStoppedError: as `EngineClient.submit`.
        """
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, self._sink(index, request.decoder))
                self._live.add(request.request_id)
        except BaseException:
            self._cancel()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all choices as they come, each with the index of its choice.

        Raises:
            ApiError: the engine failed, or has stopped.
        """
        while self._live:
            index, event = await self._events.get()
            if event.finish_reason is not None:
                self._live.discard(event.request_id)
            _raise_failure(event)
            yield index, event

    async def collect(self) -> list[Generation]:
        """All choices, whole.

        Raises:
            ApiError: as `events`.
        """
        events: list[list[Event]] = [[] for _ in self._requests]
        async for index, event in self.events():
            events[index].append(event)
        return [Generation.of(own) for own in events]

    async def while_connected(self, receive: Receive, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled as soon as the client has gone.

        Args:
            receive: of a request whose body has been read.

        Raises:
            ClientGoneError: it has gone.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self._metrics.client_gone()
                raise ClientGoneError
            return working.result()
        finally:
            for task in (working, gone):
                task.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    def _sink(self, index: int, decoder: str) -> EventSink:
        def sink(event: Event) -> None:
            if event.finish_reason is not None:
                self._metrics.finished(decoder, event)
            # A loop that has been closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return sink

    def _cancel(self) -> None:
        for request_id in self._live:
            self._engine.cancel(request_id)
        self._live.clear()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _raise_failure(event: Event) -> None:
    if event.finish_reason == "error" and event.invalid:
        raise ApiError(400, event.error or "the request was refused", code="invalid_request")
    if event.finish_reason == "error":
        raise ApiError(500, event.error or "the engine failed", code="engine_error")
    if event.finish_reason == "cancelled":
        # The client did not cancel: this connection still waits for it.
        raise ApiError(503, event.error or "the response was cancelled", code="cancelled")
