"""The ASGI application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from prometheus_client.registry import Collector
from starlette.responses import Response

from prefillshare_train.serving.api import EngineClient
from prefillshare_train.serving.server.chat import chat_router
from prefillshare_train.serving.server.completions import completions_router
from prefillshare_train.serving.server.config import ServerConfig
from prefillshare_train.serving.server.errors import add_error_handlers
from prefillshare_train.serving.server.guard import Guard, is_open
from prefillshare_train.serving.server.operations import operations_router
from prefillshare_train.serving.server.pages import pages_router
from prefillshare_train.serving.server.running import ClientGoneError
from prefillshare_train.serving.server.service import Service

_CLIENT_CLOSED_REQUEST = 499
"""Nginx's status for a client that did not wait; nobody receives it."""


def create_app(
    engine: EngineClient,
    config: ServerConfig | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    metrics: Sequence[Collector] = (),
) -> FastAPI:
    """The application over an engine that runs; its `state.service` holds what the routes share.

    Args:
        routers: further routes of this engine.
        metrics: further metrics of this engine.
    """
    config = config or ServerConfig()
    service = Service(engine, config, metrics)

    app = FastAPI(
        title="prefillshare",
        summary="Decoders that read one prompt KV cache.",
        version="1",
        # The usual document viewers load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # Measured in `metrics`; nothing is sent anywhere because of a variable that was set.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    for router in (
        chat_router(service),
        completions_router(service),
        operations_router(service),
        pages_router(),
        *routers,
    ):
        app.include_router(router)
    add_error_handlers(app)
    app.add_exception_handler(ClientGoneError, _nobody)
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    app.openapi = lambda: _document(app, engine, config)  # type: ignore[method-assign]
    return app


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


def _document(app: FastAPI, engine: EngineClient, config: ServerConfig) -> dict[str, Any]:
    """The OpenAPI document of this very server: its decoders, and whether it asks for a key."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # What FastAPI would have answered to invalid requests; here it is a 400.
            operation["responses"].pop("422", None)
            if config.api_key is not None and is_open(path):
                operation["security"] = []
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = list(engine.decoders)
    if config.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    app.openapi_schema = document
    return document
