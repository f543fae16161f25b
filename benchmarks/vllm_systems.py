"""What `benchmarks/serve_vllm.py` measures: three servers of the same decoders.

- `shared`: `prefillshare vllm up --lora`: a vLLM process with the store connector, and our router.
- `stock`: the same vLLM process without the connector: its own LoRA adapters and prefix caching.
- `reference`: `prefillshare serve`, our own loop.

All get the same cores, dtype and GiB of K/V.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from prefillshare_train.engines.vllm.instance import Instance
from prefillshare_train.engines.vllm.launches import (
    InstanceSettings,
    Place,
    common_contract,
    instance_options,
)
from prefillshare_train.engines.vllm.process import ServerProcess, wait_until_ready
from prefillshare_train.engines.vllm.topology import BASE_NAME, Topology, read_decoder

System = Literal["shared", "stock", "reference"]
SYSTEMS: tuple[System, ...] = ("shared", "stock", "reference")
_STOP_S = 60.0


@dataclass(frozen=True)
class Running:
    """A server that takes requests.

    Attributes:
        url: where clients send them, up to and without `/v1`.
        vllm_url: its vLLM process; None where there is none.
    """

    url: str
    vllm_url: str | None


@dataclass(frozen=True, kw_only=True)
class Servers:
    """How the servers are started.

    Attributes:
        base: folder of the base.
        decoders: LoRA decoders by name.
        dtype: of weights and K/V.
        kv_gib: K/V of each server, in GiB; of the store in `shared` too, beside it.
        block_tokens: of vLLM's blocks.
        rows: responses that our own loop decodes at once; vLLM's own limit is higher.
        python: the Python that has vLLM.
        runs: folder of logs and of the store's place on disk where there is no `/dev/shm`.
        ready_s: how long a server may take to start.
    """

    base: str
    decoders: dict[str, Path]
    dtype: str
    kv_gib: int
    block_tokens: int
    rows: int
    python: Path
    runs: Path
    ready_s: float = 300.0

    @contextlib.contextmanager
    def running(self, system: System) -> Iterator[Running]:
        """A fresh server, with nothing cached, inside the block.

        Raises:
            VllmError: it does not start; the message has its last lines.
        """
        port, vllm_port = _free_port(), _free_port()
        url, vllm_url = (f"http://127.0.0.1:{number}" for number in (port, vllm_port))
        store = self._store()
        shutil.rmtree(store, ignore_errors=True)
        try:
            if system == "stock":
                process: ServerProcess = self._stock(vllm_port)
                found = Running(vllm_url, vllm_url)
            elif system == "shared":
                process = self._process(system, url, self._up(port, vllm_port, store))
                found = Running(url, vllm_url)
            else:
                process = self._process(system, url, self._serve(port))
                found = Running(url, None)
            with contextlib.ExitStack() as stack:
                process.start()
                stack.callback(process.stop, _STOP_S)
                wait_until_ready([process], timeout_s=self.ready_s)
                _wait_for_models(found.url, self.ready_s)
                yield found
        finally:
            shutil.rmtree(store, ignore_errors=True)

    def _up(self, port: int, vllm_port: int, store: Path) -> list[str]:
        command = ["vllm", "up", f"--base={self.base}", "--lora", *self._decoder_options()]
        command += [f"--port={port}", f"--instance-port={vllm_port}", f"--dtype={self.dtype}"]
        command += [f"--block-size={self.block_tokens}", f"--kv-gib={self.kv_gib}"]
        command += [f"--store={store}", f"--store-gib={self.kv_gib}"]
        command += [f"--vllm-python={self.python}", f"--run-dir={self.runs / 'up'}"]
        return command

    def _serve(self, port: int) -> list[str]:
        command = ["serve", f"--base={self.base}", *self._decoder_options(), f"--port={port}"]
        command += [f"--dtype={self.dtype}", f"--kv-gib={self.kv_gib}"]
        return [*command, f"--max-decode-rows={self.rows}"]

    def _stock(self, port: int) -> Instance:
        """The instance that `vllm up --lora` starts, without its connector."""
        topology = Topology(
            base=self.base,
            decoders=tuple(read_decoder(name, folder) for name, folder in self.decoders.items()),
            route="lora",
        )
        fingerprint, dtype = common_contract(topology, self.dtype)
        settings = InstanceSettings(
            cpu=True,
            dtype=dtype,
            block_size=self.block_tokens,
            kv_gib=self.kv_gib,
        )
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        options = instance_options(
            topology,
            topology.pools[0],
            settings,
            Place(port=port, cores=cores),
            base_fingerprint=fingerprint,
            dtype=dtype,
            folders={BASE_NAME: self.base}
            | {name: str(folder.absolute()) for name, folder in self.decoders.items()},
        )
        options = dataclasses.replace(options, kv_transfer=None)
        return Instance(options, python=self.python, log=self.runs / "stock.log")

    def _process(self, name: str, url: str, arguments: list[str]) -> ServerProcess:
        program = Path(sys.executable).with_name("prefillshare")
        return ServerProcess(
            name,
            [str(program), *arguments],
            variables={},
            url=url,
            log=self.runs / f"{name}.log",
        )

    def _decoder_options(self) -> list[str]:
        return [f"--decoder={name}={folder}" for name, folder in self.decoders.items()]

    def _store(self) -> Path:
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() else self.runs
        return parent / f"prefillshare-benchmark-{os.getpid()}"


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as an exit does, so that no server outlives it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_models(url: str, timeout_s: float) -> None:
    """A router is healthy before its instance is seen to be."""
    end = time.monotonic() + timeout_s
    while True:
        answer = httpx.get(f"{url}/ready", timeout=10.0, trust_env=False)
        if answer.is_success or answer.status_code == 404:  # vLLM has no such path
            return
        if time.monotonic() > end:
            raise SystemExit(f"{url}/ready still answers {answer.status_code}: {answer.text}")
        time.sleep(0.2)
