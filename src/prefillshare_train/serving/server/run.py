"""Running the application until a signal asks to stop, and stopping without losing answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import APIRouter
from prometheus_client.registry import Collector

from prefillshare_train.serving.api import EngineClient
from prefillshare_train.serving.server.app import create_app
from prefillshare_train.serving.server.config import ServerConfig, is_loopback
from prefillshare_train.serving.server.guard import MAX_HEADER_BYTES
from prefillshare_train.serving.server.protocol import deadline_protocol
from prefillshare_train.serving.server.service import Service

_LOG = logging.getLogger("uvicorn.error")
_KEEP_ALIVE_S = 30
_LAST_BYTES_S = 5
"""After the engine has drained: for the last bytes to reach their clients."""

Drain = Callable[[float], bool]
"""Let running responses finish within so many seconds; says whether all have."""


class DrainingServer(uvicorn.Server):
    """On the first signal drains, on the second stops at once.

    While it drains the socket stays open, so that `/ready` can tell a load balancer (503) and
    new requests get an answer (503) instead of a refused connection.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain: Drain) -> None:
        super().__init__(config)
        self._service = service
        self._drain = drain
        self._draining: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        self._service.accepting = False
        self._draining = threading.Thread(target=self._drain_and_exit, daemon=True)
        self._draining.start()

    def _drain_and_exit(self) -> None:
        seconds = self._service.config.drain_timeout_s
        _LOG.info("Draining: running responses may take %g s more", seconds)
        try:
            if not self._drain(seconds):
                _LOG.warning("Some responses have not finished; they are cut off")
        finally:
            self.should_exit = True


def make_server(
    engine: EngineClient,
    drain: Drain,
    config: ServerConfig,
    *,
    routers: Sequence[APIRouter] = (),
    metrics: Sequence[Collector] = (),
) -> DrainingServer:
    """A server to `run`, over an engine that runs.

    Args:
        routers: further routes of this engine.
        metrics: further metrics of this engine.
    """
    app = create_app(engine, config, routers=routers, metrics=metrics)
    if not is_loopback(config.host):
        _LOG.warning(
            "Listening on %s: whoever has the API key can use the models, and traffic is not "
            "encrypted. Put a proxy with TLS before it",
            config.host,
        )
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=deadline_protocol(config.header_timeout_s, config.write_timeout_s),
        ws="none",
        lifespan="on",
        limit_concurrency=config.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_BYTES_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        proxy_headers=False,
        server_header=False,
    )
    return DrainingServer(settings, app.state.service, drain)
