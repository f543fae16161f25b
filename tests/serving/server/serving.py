"""A server over an engine, on a free loopback port, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
from tests.serving.server.fake_engine import FakeEngine

from prefillshare_train.serving.server.config import ServerConfig
from prefillshare_train.serving.server.run import DrainingServer, make_server

HI = [{"role": "user", "content": "Hi"}]


@dataclass
class Served:
    """A server that runs, and a client of it."""

    engine: Any
    server: DrainingServer
    port: int
    http: httpx.Client

    def chat(self, **more: Any) -> httpx.Response:
        """Ask for a chat completion."""
        body = {"model": "math", "messages": HI, **more}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, **more: Any) -> httpx.Response:
        """Ask for a plain completion."""
        return self.http.post("/v1/completions", json={"model": "math", "prompt": "a", **more})

    def lives(self) -> bool:
        """Whether it still answers."""
        return self.http.get("/health").status_code == 200 and self.chat().status_code == 200


@contextlib.contextmanager
def serve(engine: Any = None, *, send_buffer: int = 0, **options: Any) -> Iterator[Served]:
    """Serve an engine.

    Args:
        send_buffer: bytes that the system keeps for a client that does not read; 0 leaves it.
        options: of `ServerConfig`.
    """
    engine = engine or FakeEngine()
    config = replace(ServerConfig(port=0), **options)
    server = make_server(engine, getattr(engine, "drain", lambda _: True), config)
    sock = socket.create_server(("127.0.0.1", 0))
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        try:
            yield Served(engine, server, port, client)
        finally:
            server.should_exit = True
            thread.join(10)


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    """Wait until something is so; fail where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.01)
