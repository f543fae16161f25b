"""SIGTERM: no new requests, the running ones finish, bounded; a second one stops at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.serving.server.serving import HI, wait_for

REPOSITORY = Path(__file__).resolve().parents[3]
SERVER = """
import sys
from tests.serving.server.fake_engine import FakeEngine
from prefillshare_train.serving.server.config import ServerConfig
from prefillshare_train.serving.server.run import make_server
engine = FakeEngine("x" * 100, delay_s=float(sys.argv[1]))
config = ServerConfig(port=0, drain_timeout_s=float(sys.argv[2]))
make_server(engine, engine.drain, config).run()
print("stopped", flush=True)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, delay_s: float, drain_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(delay_s), str(drain_s)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: any("Uvicorn running on" in line for line in self.log), 60)
        line = next(line for line in self.log if "Uvicorn running on" in line)
        self.url = line.split("running on ")[1].split()[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def chat(self) -> httpx.Response:
        body = {"model": "math", "messages": HI}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)

    def start_chat(self) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
        """Ask in a thread, and wait until the engine has it."""
        answers: list[httpx.Response | Exception] = []

        def ask() -> None:
            try:
                answers.append(self.chat())
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        stats = f"{self.url}/stats"
        wait_for(lambda: json.loads(httpx.get(stats).text)["engine"]["decoding"] == 1)
        return thread, answers

    def stop(self) -> int:
        """The exit status, which must come soon."""
        return self.process.wait(20)


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate()


def test_running_responses_finish(started: list[Process]) -> None:
    server = Process(0.02, 30)
    started.append(server)
    thread, answers = server.start_chat()
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = server.chat()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "stopping"
    thread.join(20)
    assert isinstance(answers[0], httpx.Response)
    assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 100
    assert server.stop() == 0
    assert "stopped" in (server.process.stdout or iter([])).read()  # type: ignore[union-attr]


def test_draining_is_bounded(started: list[Process]) -> None:
    server = Process(60, 0.3)
    started.append(server)
    thread, _ = server.start_chat()
    server.process.send_signal(signal.SIGTERM)
    assert server.stop() == 0
    thread.join(20)


def test_a_second_signal_does_not_wait(started: list[Process]) -> None:
    server = Process(60, 600)
    started.append(server)
    thread, _ = server.start_chat()
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.stop() == 0
    thread.join(20)
