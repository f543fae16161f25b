"""A second `up` on the same ports is told so; what a killed one left behind claims nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prefillshare_train.engines.vllm.claims import claimed, state_folder
from prefillshare_train.engines.vllm.errors import VllmError

HOST = "127.0.0.1"
HOLD = """
import sys
from prefillshare_train.engines.vllm.claims import claimed
with claimed("127.0.0.1", [int(sys.argv[1])], {"logs": "over/there"}):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def test_a_running_one_is_named_and_a_killed_one_is_not_in_the_way(port: int) -> None:
    command = [sys.executable, "-c", HOLD, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(VllmError, match=f"{port} belongs .* {other.pid} .*over/there"),
            claimed(HOST, [port], {}),
        ):
            pass
        other.kill()
    assert json.loads((state_folder() / f"{port}.json").read_text())["pid"] == other.pid
    with claimed(HOST, [port], {"logs": "mine"}):
        held = json.loads((state_folder() / f"{port}.json").read_text())
        assert held == {"pid": os.getpid(), "logs": "mine"}


def test_a_port_that_something_else_listens_on_is_refused(port: int) -> None:
    with socket.socket() as busy:
        busy.bind((HOST, port))
        busy.listen()
        with (
            pytest.raises(VllmError, match=re.escape(f"{HOST}:{port} cannot be listened on")),
            claimed(HOST, [port], {}),
        ):
            pass
    with claimed(HOST, [port], {}):
        pass


def test_a_state_folder_that_cannot_be_written_is_named(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(VllmError, match="set XDG_STATE_HOME"), claimed(HOST, [port], {}):
        pass
