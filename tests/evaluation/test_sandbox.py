"""Hostile programs in the sandbox: each fails, leaves nothing behind, and the next run works."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.evaluation.sandboxes import sandbox_or_skip

from prefillshare_train.evaluation import sandbox as sandbox_module
from prefillshare_train.evaluation.jail import Kind, Outcome, run_jailed
from prefillshare_train.evaluation.sandbox import Limits, Sandbox
from prefillshare_train.evaluation.task import EvaluationError

MIB = 1 << 20
LIMITS = Limits(seconds=20, memory=400 * MIB, disk=16 * MIB, processes=40, output=100_000)
SHORT = Limits(seconds=0.8, memory=400 * MIB, disk=16 * MIB, processes=40, output=100_000)

# At most 2**9 processes, should nothing hold them back; each in a session of its own.
FORK_BOMB = """
import os, time
for _ in range(9):
    try:
        os.fork()
        os.setsid()
    except OSError:
        pass
time.sleep(60)
"""
MEMORY_OF_MANY = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = b"x" * (100 << 20)
        break
time.sleep(60)
"""
FILE_EATER = """
for number in range(64):
    with open(f"eaten-{number}", "wb") as file:
        file.write(b"x" * (4 << 20))
        print(number, flush=True)
"""
WORD_HUNTER = """
import os, sys
frame = sys._getframe()
while frame:
    print({**frame.f_locals, **frame.f_globals})
    for value in list(frame.f_locals.values()):
        if isinstance(value, bytes):
            os.write(1, value)
            print(value.hex(), value)
    frame = frame.f_back
print(sys.argv, os.environ, sys.stdin.read(), os.listdir("."))
for name in ("environ", "mem", "fd/0"):
    try:
        print(open(f"/proc/{os.getppid()}/{name}", "rb").read(1000))
    except OSError as error:
        print(error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip(LIMITS)


@pytest.fixture
def without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that forbids namespaces."""

    def run(kind: Kind, *arguments: Any, **options: Any) -> Outcome:
        if kind.namespaces:
            raise EvaluationError("namespaces are forbidden")
        return run_jailed(kind, *arguments, **options)

    monkeypatch.setattr(sandbox_module, "run_jailed", run)


@pytest.fixture
def weak(without_namespaces: None) -> Sandbox:
    with pytest.warns(UserWarning, match="weak protection"):
        return Sandbox(LIMITS, allow_network=True)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The sandbox leaves no temporary file of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def running(mark: str) -> list[int]:
    """Processes with `mark` in their arguments."""
    processes = psutil.process_iter(["cmdline"])
    return [p.pid for p in processes if mark in " ".join(p.info["cmdline"] or [])]


def run_marked(box: Sandbox, program: str, limits: Limits) -> Outcome:
    """Runs a program whose processes can be told, and sees that none is left."""
    mark = secrets.token_hex(16)
    outcome = box.run([sys.executable, "-c", f"{program}\n# {mark}"], limits=limits)
    assert running(mark) == []
    return outcome


def test_a_program_that_comes_to_its_end(sandbox: Sandbox) -> None:
    outcome = sandbox.run_program("print(open('given').read())", files={"given": b"hello"})
    assert (outcome.finished, outcome.returncode, outcome.stopped) == (True, 0, "")
    assert outcome.output == "hello\n"


def test_protections_are_those_that_were_found(sandbox: Sandbox) -> None:
    found = sandbox.protections()
    assert found.pop("process_limit") or os.geteuid() == 0
    assert all(found.values()), found
    assert "no_network" in found
    assert sandbox.describe()["limits"]["processes"] == 40


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os._exit(0)", ""),
        ("import sys; sys.exit()", ""),
        ("raise SystemExit(0)", ""),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import os; os.kill(os.getppid(), 9)", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ""),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(b'x' * (32 << 20))", "Error"),
        ("[open('/dev/null') for _ in range(1000)]", "Too many open files"),
        ("import os; os.mkdir('/usr/made-up')", "Read-only file system"),
        ("open('/proc/sys/kernel/core_pattern', 'w')", "Error"),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        ("print(input())", "EOFError"),
    ],
)
def test_not_the_end(sandbox: Sandbox, program: str, said: str) -> None:
    outcome = sandbox.run_program(program)
    assert not outcome.finished
    assert outcome.stopped == ""
    assert said in outcome.output
    assert sandbox.run_program("pass").finished


@pytest.mark.parametrize(
    ("program", "stopped"),
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("while True: print('x' * 1000)", "output"),
        (MEMORY_OF_MANY, "memory"),
    ],
)
def test_limits_that_are_watched(sandbox: Sandbox, program: str, stopped: str) -> None:
    limits = SHORT if stopped == "time" else LIMITS
    outcome = run_marked(sandbox, program, limits)
    assert (outcome.stopped, outcome.returncode) == (stopped, None)
    assert outcome.seconds < limits.seconds + 3
    assert len(outcome.output) <= limits.output
    assert not sandbox.run_program(program, limits=limits).finished
    assert sandbox.run_program("pass").finished


def test_fork_bomb(sandbox: Sandbox) -> None:
    outcome = run_marked(sandbox, FORK_BOMB, SHORT)
    assert outcome.stopped in ("time", "processes")
    assert not sandbox.run_program(FORK_BOMB, limits=SHORT).finished
    assert sandbox.run_program("pass").finished


def test_file_eater_fills_its_own_disk_only(sandbox: Sandbox) -> None:
    outcome = sandbox.run_program(FILE_EATER)
    assert not outcome.finished
    assert "No space left on device" in outcome.output
    written = [line for line in outcome.output.splitlines() if line.isdigit()]
    assert len(written) * 4 * MIB <= LIMITS.disk
    assert sandbox.run_program("pass").finished


def test_network_is_not_reached(sandbox: Sandbox) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = server.getsockname()
        program = f"import socket; socket.create_connection({address}, 2).send(b'stolen')"
        outcome = sandbox.run_program(program)
        assert not outcome.finished
        assert "Error" in outcome.output
        with pytest.raises(TimeoutError):
            server.accept()
        # The listener can be reached from outside of the sandbox.
        subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
        server.accept()[0].close()


def test_files_outside_stay(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o666)
    for program in (
        f"open({str(kept)!r}, 'w').write('yours')",
        f"import os; os.remove({str(kept)!r})",
        f"open({str(kept)!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
    ):
        outcome = sandbox.run_program(program)
        assert not outcome.finished
        assert "FileNotFoundError" in outcome.output
    assert kept.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_tmp_is_the_runs_own(sandbox: Sandbox) -> None:
    name = f"/tmp/{secrets.token_hex(16)}"
    assert sandbox.run_program(f"open({name!r}, 'x')").finished
    assert not Path(name).exists()
    assert sandbox.run_program(f"open({name!r}, 'x')").finished


def test_environment_is_clean(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADE_UP_API_KEY", "made-up-secret")
    program = """
import glob, os
print(dict(os.environ))
for name in glob.glob("/proc/*/environ"):
    try:
        print(open(name).read())
    except OSError:
        pass
assert os.environ["MADE_UP_API_KEY"]
"""
    outcome = sandbox.run_program(program)
    assert not outcome.finished
    assert "KeyError" in outcome.output
    assert "made-up-secret" not in outcome.output


def test_the_word_is_not_found(sandbox: Sandbox) -> None:
    outcome = sandbox.run_program(WORD_HUNTER)
    assert not outcome.finished
    assert "run_child" in outcome.output
    assert "Permission denied" in outcome.output


def test_background_processes_end_with_the_program(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(16)
    program = f"""
import subprocess, sys
code = "import time; time.sleep(60) # {mark}"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
"""
    outcome = sandbox.run_program(program)
    assert outcome.seconds < 10
    assert running(mark) == []


def test_collected_files(sandbox: Sandbox) -> None:
    program = """
import os
open("left", "w").write("behind")
os.symlink("/etc/alternatives", "link")
os.mkfifo("pipe")
"""
    outcome = sandbox.run_program(program, collect=["left", "link", "pipe", "absent"])
    assert outcome.finished
    assert outcome.files == {"left": b"behind"}
    with pytest.raises(ValueError, match="plain file name"):
        sandbox.run_program("pass", collect=["../left"])


def test_runs_side_by_side(sandbox: Sandbox) -> None:
    programs = ["assert False", "pass", "while True: pass", "pass"]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda p: sandbox.run_program(p, limits=SHORT).finished, programs))
    assert found == [False, True, False, True]


def test_sandbox_ends_with_its_owner(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(16)
    command = [sys.executable, "-c", f"while True: pass # {mark}"]
    owner = os.fork()
    if owner == 0:
        sandbox.run(command, limits=Limits(seconds=60))
        os._exit(0)
    wait_until(lambda: len(running(mark)) > 0)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    wait_until(lambda: running(mark) == [])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_namespaces_it_is_refused(without_namespaces: None) -> None:
    with pytest.raises(EvaluationError, match=r"off the network.*forbidden.*allow_network"):
        Sandbox(LIMITS)


def test_where_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: Kind, *arguments: Any, **options: Any) -> Outcome:
        raise EvaluationError(f"{kind} is broken")

    monkeypatch.setattr(sandbox_module, "run_jailed", run)
    with pytest.raises(EvaluationError, match=r"no sandbox works here.*limits alone is broken"):
        Sandbox(LIMITS, allow_network=True)


def test_limits_alone_say_what_is_missing(weak: Sandbox) -> None:
    assert weak.describe()["kind"].startswith("limits alone")
    found = weak.protections()
    assert not found["no_network"]
    assert not found["no_writes_outside"]
    assert found["memory_limit"]
    assert weak.run_program("print(open('given').read())", files={"given": b""}).finished


@pytest.mark.parametrize(
    ("program", "stopped"),
    [
        ("while True: pass", "time"),
        ("while True: print('x' * 1000)", "output"),
        (MEMORY_OF_MANY, "memory"),
        (FORK_BOMB, "processes"),
        ("import os; os._exit(0)", ""),
        ("import os; os.environ['MADE_UP_API_KEY']", ""),
        ("x = bytearray(1 << 30)", ""),
        ("open('big', 'wb').write(b'x' * (32 << 20))", ""),
    ],
)
def test_limits_alone(
    weak: Sandbox, monkeypatch: pytest.MonkeyPatch, program: str, stopped: str
) -> None:
    monkeypatch.setenv("MADE_UP_API_KEY", "made-up-secret")
    limits = SHORT if stopped == "time" else LIMITS
    if stopped == "processes" and weak.protections()["process_limit"]:
        stopped, limits = "time", SHORT
    assert run_marked(weak, program, limits).stopped == stopped
    assert not weak.run_program(program, limits=limits).finished
    assert weak.run_program("pass").finished


def test_limits_alone_kill_background_processes(weak: Sandbox) -> None:
    mark = secrets.token_hex(16)
    program = f"""
import subprocess, sys
code = "import time; time.sleep(60) # {mark}"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
"""
    weak.run_program(program)
    assert running(mark) == []
