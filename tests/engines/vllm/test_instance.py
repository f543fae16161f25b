"""One server process, with a small script in vLLM's place."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.instance import Instance, InstanceOptions
from prefillshare_train.engines.vllm.process import InstanceError, wait_until_ready

# A server with a child of its own, as vLLM has; what it does is told by SERVER_DOES.
_SERVER = """
import http.server, json, os, signal, subprocess, sys, time
what = os.environ.get("SERVER_DOES", "")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if what == "fail":
    print("loading weights"); sys.exit("ValueError: the weights are not there")
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"child": child.pid}), flush=True)
if what == "die":
    sys.exit(7)
if what == "hang":
    time.sleep(600)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *arguments):
        pass
time.sleep(0.5)
http.server.HTTPServer((options["--host"], int(options["--port"])), Health).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> str:
    """A `python` that ignores `-P -m MODULE` and runs the script above."""
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def instance(server: str, port: int, tmp_path: Path) -> Iterator[Instance]:
    options = InstanceOptions(model="m", served_name="base", port=port)
    made = Instance(options, python=server, log=tmp_path / "logs" / "prefill-0.log")
    yield made
    made.stop(grace_s=0)


def _doing(instance: Instance, what: str, server: str) -> Instance:
    options = InstanceOptions(
        model="m",
        served_name="base",
        port=instance.options.port,
        environment={"SERVER_DOES": what},
    )
    return Instance(options, python=server, log=instance.log)


def _child(instance: Instance) -> psutil.Process:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for line in instance.log.read_text().splitlines():
            if line.startswith('{"child"'):
                return psutil.Process(json.loads(line)["child"])
        time.sleep(0.05)
    raise AssertionError("the server has started no child")


def _gone(process: psutil.Process) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_ready_and_leaves_nothing_behind(instance: Instance) -> None:
    instance.start()
    assert wait_until_ready([instance], timeout_s=20)
    child = _child(instance)
    assert instance.exit_code() is None
    assert child.is_running()
    instance.stop()
    assert instance.pid is None
    assert not instance.is_ready()
    assert _gone(child)
    instance.stop()  # a second time does nothing


def test_one_that_ignores_the_request_to_end_is_killed(instance: Instance, server: str) -> None:
    with _doing(instance, "stubborn", server) as stubborn:
        wait_until_ready([stubborn], timeout_s=20)
        child, leader = _child(stubborn), psutil.Process(stubborn.pid)
        stubborn.stop(grace_s=0.3)
        assert _gone(leader)
        assert _gone(child)


def test_the_engine_ends_with_a_server_that_ended_first(instance: Instance, server: str) -> None:
    with _doing(instance, "die", server) as dying:
        child = _child(dying)
        with pytest.raises(InstanceError, match=r"prefill-0 has ended with status 7"):
            wait_until_ready([dying], timeout_s=20)
        assert child.is_running()
        dying.stop()
        assert _gone(child)


def test_a_failure_shows_the_last_lines_of_this_run_alone(instance: Instance, server: str) -> None:
    instance.log.parent.mkdir()
    instance.log.write_text("from an earlier run\n")
    with _doing(instance, "fail", server) as failing:
        with pytest.raises(InstanceError) as caught:
            wait_until_ready([failing], timeout_s=20)
        assert "status 1" in str(caught.value)
        assert f"The last lines of {instance.log}" in str(caught.value)
        assert "  ValueError: the weights are not there" in str(caught.value)
        assert "earlier run" not in str(caught.value)
    assert instance.log.read_text().startswith("from an earlier run\n")


def test_one_killed_from_outside_is_reported_by_its_signal(instance: Instance) -> None:
    instance.start()
    wait_until_ready([instance], timeout_s=20)
    assert instance.pid is not None
    os.kill(instance.pid, 9)
    assert _gone(psutil.Process(instance.pid))
    assert instance.exit_code() == -9
    with pytest.raises(InstanceError, match="by signal SIGKILL"):
        instance.require_running()


def test_it_can_be_started_again_after_a_stop(instance: Instance) -> None:
    for _ in range(2):
        instance.start()
        assert wait_until_ready([instance], timeout_s=20)
        instance.stop()


def test_an_answer_from_a_stranger_on_its_port_is_not_its_own(
    instance: Instance, server: str
) -> None:
    instance.start()
    wait_until_ready([instance], timeout_s=20)
    other = _doing(instance, "", server)
    assert not other.is_ready()
    with other:
        end = time.monotonic() + 20
        while other.exit_code() is None and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(InstanceError, match="has ended with status 1"):
            other.require_running()


def test_the_wait_is_bounded_and_can_be_ended(instance: Instance, server: str) -> None:
    with _doing(instance, "hang", server) as hanging:
        started = time.monotonic()
        with pytest.raises(InstanceError, match=r"did not answer http://127.0.0.1:\d+/health"):
            wait_until_ready([hanging], timeout_s=1)
        assert time.monotonic() - started < 10
        assert not wait_until_ready([hanging], timeout_s=60, should_stop=lambda: True)


def test_a_command_that_cannot_be_run_is_said_so(port: int, tmp_path: Path) -> None:
    options = InstanceOptions(model="m", served_name="base", port=port)
    missing = Instance(options, python=tmp_path / "python", log=tmp_path / "prefill-0.log")
    with pytest.raises(VllmError, match="prefill-0 cannot be started"):
        missing.start()
    missing.stop()


def test_the_command_line_and_the_environment_say_all_options() -> None:
    options = InstanceOptions(
        model="/models/base",
        served_name="base",
        port=8101,
        dtype="float32",
        block_size=32,
        max_model_len=2048,
        prefix_caching=False,
        kv_transfer={"kv_connector": "C", "kv_role": "kv_both"},
        lora={"math": "/adapters/math", "code": "/adapters/code"},
        max_lora_rank=64,
        middleware=("package.Guard",),
        enforce_eager=True,
        cores="0",
        cpu_kv_gib=1,
        nixl_port=5601,
        environment={"X": "1"},
        extra=("--seed", "3"),
    )
    command = options.command("/env/bin/python")
    assert command[:4] == ["/env/bin/python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
    line = " ".join(command)
    assert "--model /models/base --served-model-name base --host 127.0.0.1 --port 8101" in line
    assert "--dtype float32 --block-size 32 --max-model-len 2048 --max-lora-rank 64" in line
    assert "--no-enable-prefix-caching --enforce-eager" in line
    assert "--enable-lora --max-loras 2 --lora-modules math=/adapters/math code=/adapters/c" in line
    assert '--kv-transfer-config {"kv_connector": "C", "kv_role": "kv_both"}' in line
    assert line.endswith("--middleware package.Guard --seed 3")
    variables = options.variables()
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5601"
    assert variables["UCX_USE_MT_MUTEX"] == "y"
    assert variables["X"] == "1"
    assert options.url == "http://127.0.0.1:8101"


def test_only_what_is_asked_for_is_passed() -> None:
    options = InstanceOptions(model="m", served_name="base", port=1, host="::1")
    line = " ".join(options.command("python"))
    for absent in ("--block-size", "--enable-lora", "--kv-transfer-config", "--middleware"):
        assert absent not in line
    assert "--enable-prefix-caching" in line
    assert set(options.variables()) == {"VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"}
    assert options.url == "http://[::1]:1"
