"""What operators ask of the router: its replicas, and to let one run empty."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from prefillshare_train.engines.vllm.router.replicas import Fleet, Replica, Role
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.responses import error_responses


class ReplicaState(BaseModel):
    """One instance.

    Attributes:
        models: what it must serve, by the names that it uses.
        why_down: for people; empty while it is up.
        running: prefills and responses that are there or on their way. 0 of one that drains: it
            may be stopped.
    """

    address: str
    role: Role
    models: list[str]
    up: bool
    why_down: str
    draining: bool
    running: int


class ReplicaList(BaseModel):
    """All instances."""

    replicas: list[ReplicaState]


class DrainRequest(BaseModel):
    """Which instance, and whether new requests may go there."""

    model_config = ConfigDict(extra="forbid", strict=True)
    address: str
    draining: bool = True


def replicas_router(fleet: Fleet) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["operations"])

    @router.get("/replicas", responses=error_responses(401, 403), summary="List the instances")
    async def replicas() -> ReplicaList:
        return ReplicaList(replicas=[_state(replica) for replica in fleet.replicas.values()])

    @router.post(
        "/replicas/drain",
        responses=error_responses(400, 401, 403, 404),
        summary="Send an instance no new requests, or send them again",
    )
    async def drain(body: DrainRequest) -> ReplicaState:
        replica = fleet.replicas.get(body.address.rstrip("/"))
        if replica is None:
            raise ApiError(404, f"there is no replica {body.address!r}", param="address")
        replica.draining = body.draining
        return _state(replica)

    return router


def _state(replica: Replica) -> ReplicaState:
    return ReplicaState(
        address=replica.address,
        role=replica.role,
        models=sorted(replica.names),
        up=replica.up,
        why_down=replica.why_down,
        draining=replica.draining,
        running=replica.running,
    )
