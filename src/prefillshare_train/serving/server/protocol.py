"""Uvicorn's HTTP protocol with the deadlines that it lacks: slow headers, and slow readers."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class DeadlineProtocol(H11Protocol):
    """Closes connections that hold resources and do nothing.

    Attributes:
        header_timeout_s: from the connection's start, or a request's first byte, until its
            headers must be complete.
        write_timeout_s: how long a full send buffer may stay full.
    """

    header_timeout_s: float
    write_timeout_s: float

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first request."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Await the rest of the headers, until they are there."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def pause_writing(self) -> None:
        """The client takes nothing: wait, but not for ever."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client takes again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(
                self.header_timeout_s, self.timeout_keep_alive_handler
            )


def deadline_protocol(header_timeout_s: float, write_timeout_s: float) -> type[DeadlineProtocol]:
    """The protocol with its deadlines set; uvicorn makes the instances itself."""
    deadlines = {"header_timeout_s": header_timeout_s, "write_timeout_s": write_timeout_s}
    return type("DeadlineProtocol", (DeadlineProtocol,), deadlines)
