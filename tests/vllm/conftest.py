"""Real vLLM servers over SmolLM2-135M, in float32, and what `core.generate` answers.

    make test-vllm

Run by the Python of .venv-vllm. Where vLLM is not installed nothing here is collected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import random
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    from tests.vllm.calls import Deployment
    from tests.vllm.models import FULL, Models, make_models

    from prefillshare_train.engines.vllm.instance import Instance, InstanceOptions
    from prefillshare_train.engines.vllm.process import wait_until_ready

    os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / ".cache" / "models" / "smollm2-135m-instruct"
READY_S = 240
# Servers that never rest share few cores here, and virtual machines stand still at times: a first
# handshake took a minute. What is about these times brings its own.
LEASE_S = 300
"""For how long the base holds K/V that nobody reads."""
CLAIM_TIMEOUT_S = 60.0
CHUNKED = ("--max-num-batched-tokens", "64", "--max-num-seqs", "16")
# Around the edges of blocks of 32; from 65 on, the base prefills in chunks of 64 tokens.
LENGTHS = (1, 2, 31, 32, 33, 34, 63, 64, 65, 96, 129, 200)
GUARD = "prefillshare_train.engines.vllm.guard.DecoderGuard"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The base, decoders over it, and their reference answers."""
    if not (BASE / "model.safetensors").is_file():
        pytest.fail(f"{BASE} is missing: make model")
    return make_models(BASE, tmp_path_factory.mktemp("decoders"))


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers write their logs."""
    return tmp_path_factory.mktemp("logs")


class Launcher:
    """Starts servers, and stops all that it started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Instance] = []

    def __call__(self, *options: InstanceOptions, ready: bool = True) -> list[Instance]:
        """Start servers together; ready for requests unless told otherwise."""
        new = []
        for one in options:
            log = self._folder / f"{one.served_name}-{one.port}.log"
            new.append(Instance(one, python=sys.executable, log=log))
            self._started.append(new[-1])
            new[-1].start()
        if ready:
            wait_until_ready(new, timeout_s=READY_S)
        return new

    def stop(self) -> None:
        """Stop what is left, together: who interrupts the tests may not wait for long."""
        with ThreadPoolExecutor(max(1, len(self._started))) as pool:
            list(pool.map(lambda instance: instance.stop(grace_s=5), self._started))


@pytest.fixture(scope="module")
def launch(log_folder: Path) -> Iterator[Launcher]:
    """Start servers that are stopped after the module."""
    launcher = Launcher(log_folder)
    with contextlib.ExitStack() as stack:
        stack.callback(launcher.stop)
        yield launcher


@pytest.fixture(scope="session")
def prompts(models: Models) -> dict[int, list[int]]:
    """Prompts by length, with the full decoders' answers to them made together and beforehand."""
    made = {length: prompt_of(models, length, seed=length) for length in LENGTHS}
    for name in FULL:
        models.answers(name, list(made.values()))
        models.answers_by_sharing(name, made[64], block=32)
    return made


@pytest.fixture(scope="session")
def nixl(models: Models, prompts: object, log_folder: Path) -> Iterator[Deployment]:
    """A base and two decoders over NIXL, for all tests; `ada` is guarded and `bob` is not."""
    launcher = Launcher(log_folder)
    with contextlib.ExitStack() as stack:
        stack.callback(launcher.stop)
        options = [
            nixl_server(models.base, "base", producer=True, extra=CHUNKED),
            nixl_server(models.folders["ada"], "ada", models=models, middleware=(GUARD,)),
            nixl_server(models.folders["bob"], "bob", models=models),
        ]
        base, ada, bob = launcher(*options)
        yield Deployment(base, {"ada": ada, "bob": bob})


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none of those that Linux gives to whoever asks for any.

    A server takes many of the latter before it listens on its own, and might take one of these.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(range(15_000, 32_000), 200):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                break
    return found


def server(model: Path | str, name: str, **values: Any) -> InstanceOptions:
    """Options of a small float32 server: blocks of 32 tokens, 1 GiB of K/V, nothing compiled."""
    settings: dict[str, Any] = {
        "port": free_ports(1)[0],
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 1024,
        "enforce_eager": True,
        "cpu_kv_gib": 1,
        "environment": {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"},
    }
    return InstanceOptions(model=str(model), served_name=name, **(settings | values))


def core(index: int) -> str:
    """A core to bind a server to, for `cores`."""
    return str(min(index, (os.cpu_count() or 1) - 1))


def nixl_server(
    model: Path,
    name: str,
    *,
    producer: bool = False,
    models: Models | None = None,
    lease_s: int = LEASE_S,
    **values: Any,
) -> InstanceOptions:
    """Options of a server on the NIXL route; a decoder's, unless it is the producer."""
    extra: dict[str, Any] = {"kv_lease_duration": lease_s, "claim_timeout_s": CLAIM_TIMEOUT_S}
    extra["num_threads"] = 1
    if models is not None:
        extra["base"] = str(models.base)
    transfer = {
        "kv_connector": "PrefillShareNixlConnector",
        "kv_role": "kv_producer" if producer else "kv_consumer",
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": extra,
    }
    settings: dict[str, Any] = {
        "kv_transfer": transfer,
        "nixl_port": free_ports(1)[0],
        "prefix_caching": producer,
        "cores": "nobind",
    }
    made = server(model, name, **(settings | values))
    # NIXL's progress thread never rests, and would inherit the core of the model's thread.
    return dataclasses.replace(made, environment={**made.environment, "OMP_NUM_THREADS": "1"})


def shared_text(seed: int) -> str:
    """A passage of its own for each seed, long enough for every test."""
    places = ["harbour", "library", "station", "garden", "museum", "market", "bridge", "school"]
    goods = ["maps", "lamps", "letters", "tools", "books", "clocks", "boats", "paintings"]
    lines = []
    for day in range(60):
        place = places[(day * 3 + seed) % 8]
        thing = goods[(day * 5 + seed // 2) % 8]
        count = (day * 7 + seed * 13) % 50 + 2
        lines.append(f"On day {day + 1} the {place} received {count} {thing} from visitor {seed}.")
    return " ".join(lines)


def prompt_of(models: Models, length: int, seed: int = 0) -> list[int]:
    """A prompt of so many token ids."""
    ids = models.tokenizer.encode(shared_text(seed))
    assert len(ids) >= length
    return list(ids[:length])


def as_text(models: Models, ids: Sequence[int]) -> str:
    """Token ids as text, for messages."""
    return str(models.tokenizer.decode(list(ids)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs servers that speak NIXL is left out unless asked for."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "nixl" in fixtures or "nixl" in item.path.name:
            item.add_marker(pytest.mark.nixl)
