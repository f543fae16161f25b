"""Running the router until a signal asks to stop."""

from __future__ import annotations

from prefillshare_train.engines.vllm.router.config import RouterConfig


def run_router(config: RouterConfig) -> None:
    """Serve in this process until SIGTERM or SIGINT; running responses may finish first.

    Raises:
        VllmError: tokenizer or template cannot be loaded, or the decoders' prompts differ.
    """
    raise NotImplementedError
