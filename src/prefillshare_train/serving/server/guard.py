"""What every request passes before a route sees it: host, key, body size, body time."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefillshare_train.serving.server.config import ServerConfig, is_loopback
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.metrics import ServerMetrics

_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""What anyone may ask for: the page (not what it shows), and what a load balancer asks."""
_OPEN_PREFIX = "/page/"
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MAX_HEADER_BYTES = 64 << 10
# The rest of a body that was not read cannot be told from the next request.
_CLOSE = {"Connection": "close"}


def is_open(path: str) -> bool:
    """Whether a path is answered without the API key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX)


class Guard:
    """ASGI middleware that refuses early and counts answers.

    - Without an API key the `Host` must be loopback, so that a web page elsewhere cannot reach
      the server under a name of its own that it points to 127.0.0.1 (DNS rebinding).
    - With one, `Authorization: Bearer KEY` is needed, but for the page's files and health checks.
    - A body is read here, whole, within its limits of size and time; routes get it at once.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: ServerMetrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._key = None if config.api_key is None else config.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"])
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
            if scope["method"] in _WITH_BODY:
                receive = await self._with_body(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except _GoneError:
            self._metrics.client_gone()
        else:
            await self._app(scope, receive, counted)

    def _check(self, headers: Headers, path: str) -> None:
        # The protocol bounds only headers that come in pieces.
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            message = f"the headers are longer than {MAX_HEADER_BYTES} bytes"
            raise ApiError(431, message, headers=_CLOSE)
        if self._key is None:
            if not is_loopback(_host(headers.get("host", ""))):
                message = "without an API key this server answers to loopback names only"
                raise ApiError(403, message, headers=_CLOSE)
            return
        if is_open(path):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", **_CLOSE},
            )

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body.

        Returns:
            A `receive` that gives it whole, and then what comes after it.
        """
        limit = self._config.max_body_bytes
        too_large = ApiError(413, f"the body is longer than {limit} bytes", headers=_CLOSE)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            seconds = self._config.body_timeout_s
            late = f"the body was not complete after {seconds:g} s"
            raise ApiError(408, late, headers=_CLOSE) from None
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay


def _host(header: str) -> str:
    """The name or address of a `Host` header, without its port; empty where there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class _GoneError(Exception):
    """The client has gone while its body was read."""
