"""Options of the server, and the rule about which addresses it may listen on."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from prefillshare_train.serving.api import ServingError


@dataclass(frozen=True)
class ServerConfig:
    """Options of the server.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        api_key: clients must send it as `Authorization: Bearer KEY`; None asks for none.
        max_body_bytes: longest request body.
        max_prompt_tokens: longest prompt; None leaves it to the engine.
        max_tokens: longest response that may be asked for.
        max_n: responses that one HTTP request may ask for (prompts times `n`).
        max_connections: open connections; one more is answered 503.
        max_rendering: requests that may wait for their prompt to be rendered; one more is
            answered 429.
        header_timeout_s: a connection that has not sent a request's headers by then is closed.
        body_timeout_s: a request whose body is not complete by then is answered 408.
        write_timeout_s: a client that takes nothing of its response for so long is cut off.
        drain_timeout_s: after SIGTERM, how long running responses may take to finish.

    Raises:
        ServingError: a value is out of its range, or the address is not loopback and there is no
            API key; the message names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    max_n: int = 16
    max_connections: int = 512
    max_rendering: int = 256
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_tokens", "max_n", "max_connections", "max_rendering"):
            if getattr(self, name) < 1:
                raise ServingError(f"{name} must be 1 or more, found {getattr(self, name)}")
        for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise ServingError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ServingError(
                f"max_prompt_tokens must be 1 or more, found {self.max_prompt_tokens}"
            )
        if not 0 <= self.port <= 65535:
            raise ServingError(f"port must be 0 to 65535, found {self.port}")
        if self.api_key is not None and not self.api_key.strip():
            raise ServingError("the API key is empty; give a long random one, or none at all")
        if self.api_key is None and not is_loopback(self.host):
            raise ServingError(
                f"refusing to listen on {self.host}: whoever reaches it could use the models. "
                "Give an API key, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
