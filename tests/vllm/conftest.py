"""Real vLLM servers over SmolLM2-135M, in float32, and what `core.generate` answers.

    make test-vllm

Run by the Python of .venv-vllm. Where vLLM is not installed nothing here is collected.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    from tests.vllm.models import Models, make_models

    from prefillshare_train.engines.vllm.instance import Instance, InstanceOptions
    from prefillshare_train.engines.vllm.process import wait_until_ready

    os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / ".cache" / "models" / "smollm2-135m-instruct"
READY_S = 240
Launch = Callable[..., list["Instance"]]


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


@pytest.fixture(scope="module")
def launch(log_folder: Path, request: pytest.FixtureRequest) -> Iterator[Launch]:
    """Start servers together, ready for requests; they are stopped after the module."""
    started: list[Instance] = []
    module = request.module.__name__.rpartition(".")[2]

    def start(*options: InstanceOptions, ready: bool = True) -> list[Instance]:
        new = []
        for one in options:
            log = log_folder / f"{module}-{one.served_name}-{one.port}.log"
            instance = Instance(one, python=sys.executable, log=log)
            started.append(instance)
            new.append(instance)
            instance.start()
        if ready:
            wait_until_ready(new, timeout_s=READY_S)
        return new

    yield start
    for instance in started:
        instance.stop()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


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
