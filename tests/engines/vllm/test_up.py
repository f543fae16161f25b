"""`prefillshare vllm up` as a person runs it, with a stand-in for vLLM and the real router."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.engines.vllm import fake_vllm
from tests.serving.served import save_served

from prefillshare_train.core.contract import Contract
from prefillshare_train.engines.vllm import up as deployment
from prefillshare_train.engines.vllm.up import share_devices

NAMES = ("math", "code", "full")
COMMAND = (
    *(sys.executable, "-c", "from prefillshare_train.cli.main import main; main()"),
    *("vllm", "up"),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served"), NAMES)


def free_ports(count: int) -> int:
    """The first of some neighbours that nobody listens on."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


class Up:
    """A running `prefillshare vllm up`."""

    def __init__(self, tmp_path: Path, served: Path, *options: str, **variables: str) -> None:
        self.first = free_ports(8)
        self.port = self.first + 7
        self.run_dir = tmp_path / "run"
        fake = fake_vllm.install(tmp_path / "python")
        command = [*COMMAND, "--base", str(served / "base"), "--vllm-python", str(fake)]
        command += ["--run-dir", str(self.run_dir), "--port", str(self.port)]
        command += ["--instance-port", str(self.first), "--drain-timeout-s", "1", *options]
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")} | variables
        self.output = tmp_path / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.search(pattern, self.text())
            if found:
                return found.group()
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} was not told:\n{self.text()}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self, name: str) -> str:
        return (self.run_dir / f"{name}.log").read_text()

    def options_of(self, name: str) -> list[str]:
        found = re.search("starting with (.*)", self.log(name))
        assert found is not None
        options: list[str] = json.loads(found.group(1))
        return options


@pytest.fixture
def start(tmp_path: Path, served: Path) -> Iterator[Any]:
    running: list[Up] = []

    def begin(*options: str, **variables: str) -> Up:
        running.append(Up(tmp_path, served, *options, **variables))
        return running[-1]

    yield begin
    for up in running:
        if up.process.poll() is None:
            left = up.children()
            up.process.kill()
            for process in left:
                process.kill()
        up.process.wait()


def decoders(served: Path, *names: str) -> list[str]:
    return [f"--decoder={name}={served / name}" for name in names]


def refused(up: Up, served: Path) -> str:
    """What a second one on the same ports is told."""
    again = ["--base", str(served / "base"), *decoders(served, "math"), "--lora"]
    again += ["--vllm-python", str(up.run_dir.parent / "python")]
    again += ["--port", str(up.port), "--instance-port", str(up.first)]
    done = subprocess.run(
        [*COMMAND, *again],
        env=os.environ | {"XDG_STATE_HOME": str(up.run_dir.parent / "state")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    return done.stderr


def test_everything_starts_serves_restarts_and_ends(start: Any, served: Path) -> None:
    up = start(*decoders(served, *NAMES), "--route=nixl", "--block-size=32")
    up.wait_for(f"serving math, code, full at http://127.0.0.1:{up.port}/v1")
    models = httpx.get(f"http://127.0.0.1:{up.port}/v1/models").json()["data"]
    assert {"math", "code", "full"} <= {model["id"] for model in models}

    prefill, full, lora = map(up.options_of, ("prefill-0", "decode-full-0", "decode-lora-0"))
    assert "--enable-prefix-caching" in prefill
    assert "--middleware" not in prefill
    for decode in (full, lora):
        assert "--no-enable-prefix-caching" in decode
        assert "--middleware" in decode
    assert full[full.index("--model") + 1] == str(served / "full")
    assert lora[lora.index("--lora-modules") + 1 :][:2] == [
        f"math={served / 'math'}",
        f"code={served / 'code'}",
    ]
    fingerprint = Contract.load(served / "math").base_fingerprint
    roles = {}
    for name, options in {"prefill": prefill, "full": full, "lora": lora}.items():
        transfer = json.loads(options[options.index("--kv-transfer-config") + 1])
        roles[name] = transfer["kv_role"]
        assert transfer["kv_connector_extra_config"]["base_fingerprint"] == fingerprint
        assert "enforce_handshake_compat" not in json.dumps(transfer), "the check stays on"
    assert roles == {"prefill": "kv_producer", "full": "kv_consumer", "lora": "kv_consumer"}

    second = refused(up, served)
    assert f"belongs to a running `prefillshare vllm up`, process {up.process.pid}" in second

    victim = next(p for p in up.children() if str(served / "full") in p.cmdline())
    victim.kill()
    up.wait_for(r"decode-full-0: was ended by signal 9, starting it again \(1 of 3\)")

    left = up.children()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0, up.text()
    _, alive = psutil.wait_procs(left, timeout=5)
    assert alive == []
    assert up.text().rstrip().endswith("stopped")


def test_the_one_that_fails_is_named_with_its_last_lines(start: Any, served: Path) -> None:
    up = start(*decoders(served, "math", "full"), "--route=store", FAKE_FAILS="/full")
    assert up.process.wait(240) == 2
    assert "decode-full-0 ended with status 7 as the deployment started" in up.text()
    assert "ValueError: this model cannot be loaded" in up.text()
    assert "Traceback" not in up.text()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(served) in str(p.cmdline())]


def test_a_decoder_of_another_base_is_refused_before_anything_starts(
    start: Any, served: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(served / "math", other)
    contract = Contract.load(other)
    dataclasses.replace(contract, base_fingerprint="sha256:" + "1" * 64).save(other)
    up = start(f"--decoder=other={other}", "--lora")
    assert up.process.wait(240) == 2
    assert "decoder other: the decoder in" in up.text()
    assert "sha256:1111" in up.text()
    assert not up.run_dir.exists()


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("2,3", ["2", "3"]),
        ("GPU-5e8f, MIG-1", ["GPU-5e8f", "MIG-1"]),
        ("", []),
        (None, ["0"]),
    ],
)
def test_only_the_gpus_that_were_given_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None, expected: list[str]
) -> None:
    """A batch system names them by UUID; a container's only one may be /dev/nvidia3."""
    (tmp_path / "nvidia3").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(deployment, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert deployment._visible_gpus() == expected


def test_devices_are_shared_by_neighbours() -> None:
    assert share_devices([0, 1, 2, 3, 4], 2) == ["0,1", "2,3,4"]
    assert share_devices([0, 1], 3) == ["0", "0", "1"]
    assert share_devices([], 2) == ["", ""]
