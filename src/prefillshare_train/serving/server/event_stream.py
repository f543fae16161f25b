"""Server-sent events that end as soon as the client has gone."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefillshare_train.serving.server.errors import as_api_error
from prefillshare_train.serving.server.running import ClientGoneError, RunningResponses

_LOG = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Streams chunks, then `[DONE]`; or an error, when one comes up on the way.

    Args:
        running: submitted before the first byte, so that a refusal is an answer of its own, and
            left at the end, so that a client that goes away frees what its responses hold.
        chunks: the models to send; fields that were not set are left out.
    """

    media_type = "text/event-stream"

    def __init__(self, running: RunningResponses, chunks: AsyncIterator[BaseModel]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # A stream has no length beforehand.
        del self.headers["content-length"]
        self._running = running
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with self._running, contextlib.suppress(ClientGoneError):
            await self._running.while_connected(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for chunk in self._chunks:
                await _send(send, _event(chunk.model_dump_json(exclude_unset=True)))
            await _send(send, DONE)
        except Exception as error:
            # The status is out already: clients look for an error among the events too.
            failure = as_api_error(error)
            if failure.status == 500:
                _LOG.error("a stream failed", exc_info=error)
            await _send(send, _event(json.dumps(failure.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
