"""Running the router until a signal asks to stop."""

from __future__ import annotations

from prefillshare_train.engines.vllm.router.backend import VllmBackend
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.operations import replicas_router
from prefillshare_train.engines.vllm.router.prompts import Prompting
from prefillshare_train.serving.server.run import DrainingServer, make_server


def make_router(backend: VllmBackend) -> DrainingServer:
    """Our own server over a backend that runs, with the router's metrics and routes added."""
    return make_server(
        backend,
        backend.drain,
        backend.config.server,
        routers=[replicas_router(backend.fleet)],
        metrics=[backend.metrics.registry],
    )


def run_router(config: RouterConfig) -> None:
    """Serve in this process until SIGTERM or SIGINT; running responses may finish first.

    Raises:
        VllmError: tokenizer or template cannot be loaded, or the decoders' prompts differ.
    """
    prompting = Prompting.load(config)
    with VllmBackend(config, prompting) as backend:
        make_router(backend).run()
