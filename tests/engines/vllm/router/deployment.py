"""A router over stand-ins, all on free loopback ports of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tests.engines.vllm.router.stub import BASE, Ledger, Script, Stub
from tests.serving.server.fake_engine import renderer
from tests.serving.server.serving import HI, wait_for

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.engines.vllm.router.backend import VllmBackend
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.prompts import Prompting
from prefillshare_train.engines.vllm.router.run import make_router
from prefillshare_train.serving.server.run import DrainingServer

NEVER = 3600.0
"""Seconds between health checks, for tests in which only a failed call may find a dead instance."""


@dataclass
class Deployment:
    """What runs, and a client of its router."""

    ledger: Ledger
    prefill: list[Stub]
    pools: dict[str, list[Stub]]
    backend: VllmBackend
    server: DrainingServer
    port: int
    http: httpx.Client

    @property
    def stubs(self) -> list[Stub]:
        """All instances."""
        return [*self.prefill, *(stub for pool in self.pools.values() for stub in pool)]

    def chat(self, model: str = "math", **more: Any) -> httpx.Response:
        """Ask for a chat completion."""
        body = {"model": model, "messages": HI, **more}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any, model: str = "math", **more: Any) -> httpx.Response:
        """Ask for a plain completion."""
        return self.http.post("/v1/completions", json={"model": model, "prompt": prompt, **more})

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.http.get("/metrics").text.splitlines()
        name = f"prefillshare_router_{name}"
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@contextlib.contextmanager
def deploy(
    *,
    handover: str = "nixl",
    prefill: int = 1,
    decoders: Sequence[str] = ("math", "code"),
    replicas: int = 1,
    script: Script | str = "It is 4.",
    delay_s: float = 0.0,
    rule: str = "last_token",
    models: Mapping[str, str] | None = None,
    ready: bool = True,
    **options: Any,
) -> Iterator[Deployment]:
    """Start stand-ins and a router.

    Args:
        prefill: instances of the base.
        replicas: instances of each decoder; 0: the prefill instances serve them themselves.
        script, delay_s: see `Stub`.
        rule: boundary rule of all decoders.
        models: what the instances call a decoder, where that is not its name.
        ready: wait until all instances are up.
        options: of `RouterConfig`, and `server`.
    """
    ledger, models = Ledger(), models or {}
    answers: dict[str, Any] = {"handover": handover, "script": script, "delay_s": delay_s}
    names = (BASE,) if replicas else (BASE, *decoders)
    bases = [Stub(ledger, names, **answers).start() for _ in range(prefill)]
    pools = {
        name: [Stub(ledger, (models.get(name, name),), **answers).start() for _ in range(replicas)]
        for name in decoders
    }
    values: dict[str, Any] = {
        "handover": handover,
        "prefill": [stub.address for stub in bases],
        "decoders": {
            name: {"replicas": [stub.address for stub in pool], "model": models.get(name)}
            for name, pool in pools.items()
        },
        "base": "unused",
        "block_tokens": 16,
        "health_interval_s": 0.05,
        **options,
    }
    config = RouterConfig.parse(values)
    prompting = Prompting(renderer(), dict.fromkeys(decoders, BoundaryRule.parse(rule)))
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    with (
        VllmBackend(config, prompting) as backend,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        server = make_router(backend)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        deployment = Deployment(ledger, bases, pools, backend, server, port, client)
        try:
            if ready:
                wait_for(lambda: all(r.up for r in backend.fleet.replicas.values()))
            yield deployment
        finally:
            server.should_exit = True
            thread.join(10)
            for stub in deployment.stubs:
                stub.kill()
    assert ledger.violations == []
