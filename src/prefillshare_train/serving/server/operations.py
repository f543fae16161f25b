"""What operators and clients ask about the server itself: models, health, metrics, statistics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.responses import (
    Health,
    Model,
    ModelList,
    Stats,
    error_responses,
)
from prefillshare_train.serving.server.service import Service


def operations_router(service: Service) -> APIRouter:
    """The routes. Those that ask the engine run in threads, since it may answer between steps."""
    router = APIRouter(tags=["operations"])

    @router.get("/v1/models", responses=error_responses(401, 403), summary="List the decoders")
    async def models() -> ModelList:
        return ModelList(data=[_model(service, name) for name in service.engine.decoders])

    @router.get(
        "/v1/models/{model}", responses=error_responses(401, 403, 404), summary="One decoder"
    )
    async def model(model: str) -> Model:
        if model not in service.engine.decoders:
            raise ApiError(404, f"there is no decoder {model!r}", code="model_not_found")
        return _model(service, model)

    @router.get("/health", responses=error_responses(403), summary="Whether it is alive")
    async def health() -> Health:
        return Health(status="ok")

    @router.get("/ready", responses=error_responses(403, 503), summary="Whether it takes requests")
    def ready() -> Health:
        if not service.accepting:
            raise ApiError(503, "the server is stopping", code="stopping")
        if service.engine.stats().workers_alive < 1:
            raise ApiError(503, "no prefill worker is alive", code="no_worker")
        return Health(status="ready")

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **error_responses(401, 403),
        },
        summary="Metrics for Prometheus",
    )
    def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/stats", responses=error_responses(401, 403), summary="What the page shows")
    def stats() -> Stats:
        return service.metrics.snapshot(accepting=service.accepting)

    return router


def _model(service: Service, name: str) -> Model:
    return Model(
        id=name,
        created=service.started,
        owned_by="prefillshare",
        max_model_len=service.context_length,
    )
