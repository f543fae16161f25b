"""One vLLM server process and its command line.

vLLM is never imported here: it runs under the Python that has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefillshare_train.engines.vllm.process import ServerProcess

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
_NO_PREFIX_CACHING = "--no-enable-prefix-caching"


@dataclass(frozen=True, kw_only=True)
class InstanceOptions:
    """How one server is started.

    Attributes:
        model: folder or hub id that vLLM loads.
        served_name: what requests call it.
        port, host: where it listens.
        dtype: of weights and activations, as vLLM's `--dtype`.
        block_size: tokens in a block of K/V; vLLM's default where None.
        max_model_len: tokens of prompt and response together; the model's limit where None.
        prefix_caching: off for decoders, whose own K/V of earlier turns would be reused.
        kv_transfer: vLLM's `--kv-transfer-config`.
        lora: adapters, name to folder.
        max_lora_rank: the highest rank among them; vLLM's default where None.
        middleware: import paths of ASGI middleware; the last one sees a request first.
        enforce_eager: no compilation: starts faster, runs slower.
        cores: CPU cores to bind to, as vLLM's `VLLM_CPU_OMP_THREADS_BIND` (`0-3`).
        cpu_kv_gib: GiB of K/V on CPU.
        nixl_port, nixl_host: where NIXL's handshake listens; one port an instance.
        shutdown_timeout_s: how long requests may go on after SIGTERM; vLLM aborts them at once
            where None.
        environment: further environment variables.
        extra: further arguments, after all others.
    """

    model: str
    served_name: str
    port: int
    host: str = "127.0.0.1"
    dtype: str = "auto"
    block_size: int | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    kv_transfer: Mapping[str, Any] | None = None
    lora: Mapping[str, str] = field(default_factory=dict)
    max_lora_rank: int | None = None
    middleware: Sequence[str] = ()
    enforce_eager: bool = False
    cores: str | None = None
    cpu_kv_gib: int | None = None
    nixl_port: int | None = None
    nixl_host: str = "127.0.0.1"
    shutdown_timeout_s: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Arguments of vLLM's OpenAI server, whatever starts it."""
        given: list[str] = ["--model", self.model, "--served-model-name", self.served_name]
        given += ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        for option, value in (
            ("--block-size", self.block_size),
            ("--max-model-len", self.max_model_len),
            ("--max-lora-rank", self.max_lora_rank if self.lora else None),
            ("--shutdown-timeout", self.shutdown_timeout_s),
        ):
            if value is not None:
                given += [option, str(value)]
        given += ["--enable-prefix-caching" if self.prefix_caching else _NO_PREFIX_CACHING]
        if self.enforce_eager:
            given += ["--enforce-eager"]
        # The router counts by it what was cached, and what a decoder ran that the base should have.
        given += ["--enable-prompt-tokens-details"]
        if self.lora:
            given += ["--enable-lora", "--max-loras", str(len(self.lora)), "--lora-modules"]
            given += [f"{name}={folder}" for name, folder in self.lora.items()]
        if self.kv_transfer is not None:
            given += ["--kv-transfer-config", json.dumps(self.kv_transfer, sort_keys=True)]
        for path in self.middleware:
            given += ["--middleware", path]
        return [*given, *self.extra]

    def command(self, python: Path | str) -> list[str]:
        """The command line under a Python that has vLLM."""
        # -P: a folder called vllm where this is started must not be taken for the package.
        return [str(python), "-P", "-m", SERVER_MODULE, *self.arguments()]

    def variables(self) -> dict[str, str]:
        """Environment variables that this instance needs beside the inherited ones."""
        found = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.cores is not None:
            found["VLLM_CPU_OMP_THREADS_BIND"] = self.cores
        if self.cpu_kv_gib is not None:
            found["VLLM_CPU_KVCACHE_SPACE"] = str(self.cpu_kv_gib)
        if self.nixl_port is not None:
            found["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self.nixl_port)
            found["VLLM_NIXL_SIDE_CHANNEL_HOST"] = self.nixl_host
            if self.cpu_kv_gib is not None:
                # A thread of NIXL's never rests. Where cores are few, the model's waits behind its
                # spinlock for up to a minute.
                found["UCX_USE_MT_MUTEX"] = "y"
        return found | dict(self.environment)

    @property
    def url(self) -> str:
        """Base URL, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class Instance(ServerProcess):
    """A vLLM server, from its start to its end; named as its log is.

    Attributes:
        options: how it is started.
    """

    def __init__(self, options: InstanceOptions, *, python: Path | str, log: Path) -> None:
        super().__init__(
            log.stem,
            options.command(python),
            variables=options.variables(),
            url=options.url,
            log=log,
        )
        self.options = options
