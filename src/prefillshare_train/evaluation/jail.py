"""One run of a command in a jail: prepares it, watches it from outside, ends it for certain."""

from __future__ import annotations

import base64
import json
import math
import os
import selectors
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from prefillshare_train.evaluation.task import EvaluationError

SCRIPT = Path(__file__).with_name("_jail.py")
WORK = "/sandbox"
TICK = 0.1
KILL_GRACE = 5.0
# The gate and the init belong to the jail, and the probe goes one process too far.
OWN_PROCESSES = 3

Stopped = Literal["", "time", "memory", "processes", "output", "killed"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use.

    Attributes:
        seconds: wall-clock time of the whole run, the start included; also CPU time of a process.
        memory: bytes of address space of a process, and of memory of all processes together.
        disk: bytes of a file, and of the working folder.
        processes: processes and threads at one time.
        open_files: open files of a process.
        output: bytes of standard output and standard error together.
    """

    seconds: float = 10.0
    memory: int = 2 << 30
    disk: int = 64 << 20
    processes: int = 64
    open_files: int = 256
    output: int = 1 << 20

    def rlimits(self) -> dict[str, int]:
        """By the names of the module `resource`."""
        return {
            "RLIMIT_CPU": math.ceil(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.disk,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        returncode: the command's exit status, -n for signal n, None where it was stopped.
        output: standard output and standard error as they came; undecodable bytes are replaced.
        stopped: the limit for which it was stopped; `killed` where the jail itself was ended from
            outside; empty where the command ended by itself.
        files: the collected files that it left.
        finished: whether the program provably ran to its end; only `Sandbox.run_program` says so.
        seconds: wall-clock time.
    """

    returncode: int | None
    output: str
    stopped: Stopped = ""
    files: dict[str, bytes] = field(default_factory=dict)
    finished: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to build the jail; `uid` is the user that the command becomes, None for our own."""

    namespaces: bool
    uid: int | None

    def __str__(self) -> str:
        user = "" if self.uid is None else " and another user"
        return ("namespaces" if self.namespaces else "limits alone") + user


def run_jailed(
    kind: Kind,
    command: Sequence[str],
    limits: Limits,
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes] | None = None,
    collect: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs a command to its end or to a limit; then nothing of it is left.

    Raises:
        EvaluationError: the jail could not start; never for what the command does.
    """
    for name in [*(files or {}), *collect]:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
    started = time.monotonic()
    with ExitStack() as stack:
        if kind.namespaces:
            work, temporary = WORK, "/tmp"
        else:
            folder = tempfile.TemporaryDirectory(prefix="prefillshare-")
            work = temporary = stack.enter_context(folder)
        job = {
            "namespaces": kind.namespaces,
            "uid": kind.uid,
            "work": work,
            "command": list(command),
            "env": _environment(work, temporary) | dict(env or {}),
            "stdin": base64.b64encode(stdin).decode(),
            "files": {n: base64.b64encode(c).decode() for n, c in (files or {}).items()},
            "collect": list(collect),
            "disk": limits.disk,
            "rlimits": limits.rlimits(),
            "readable": _readable(),
            "backstop": limits.seconds + KILL_GRACE,
            "parent": os.getpid(),
        }
        output, stopped, report = _launch(job, limits)
    if "error" in report:
        raise EvaluationError(f"the sandbox ({kind}) could not start: {report['error']}")
    status = report.get("status")
    return Outcome(
        returncode=None if stopped or status is None else os.waitstatus_to_exitcode(status),
        output=output.decode("utf-8", "replace"),
        stopped=stopped or ("killed" if status is None else ""),
        files={n: base64.b64decode(c) for n, c in report.get("files", {}).items()},
        seconds=time.monotonic() - started,
    )


def _environment(work: str, temporary: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": work,
        "TMPDIR": temporary,
        "USER": "nobody",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _readable() -> list[tuple[str, str]]:
    """Folders of the Python installation: (real path, path in the jail)."""
    pairs = set()
    for path in {sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages()}:
        if Path(path).is_dir():
            real = os.path.realpath(path)
            pairs |= {(real, real), (real, path)}
    return sorted(pairs)


def _launch(job: dict[str, Any], limits: Limits) -> tuple[bytes, Stopped, dict[str, Any]]:
    source, target = os.memfd_create("job"), os.memfd_create("report")
    with os.fdopen(source, "r+b") as job_file, os.fdopen(target, "r+b") as report_file:
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=(source, target),
            start_new_session=True,
        ) as process:
            try:
                output, stopped = _watch(process, limits)
            finally:
                _end(process)
        return output, stopped, json.loads(report_file.read() or b"{}")


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, Stopped]:
    """Collects output until the launcher has ended, or a limit is passed."""
    assert process.stdout is not None
    inspected = time.monotonic()
    deadline = inspected + limits.seconds
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            if selector.get_map() and selector.select(0 if ended else TICK):
                data = os.read(process.stdout.fileno(), 1 << 16)
                output += data
                if not data:
                    selector.unregister(process.stdout)
                if len(output) > limits.output:
                    return bytes(output[: limits.output]), "output"
            elif ended:
                return bytes(output), ""
            elif not selector.get_map():
                time.sleep(TICK / 20)
            now = time.monotonic()
            if now > deadline:
                return bytes(output), "time"
            if now - inspected > TICK:
                inspected = now
                stopped = _excess(process.pid, limits)
                if stopped:
                    return bytes(output), stopped


def _excess(pid: int, limits: Limits) -> Stopped:
    """The limit that all processes of a run together have passed."""
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return ""
    if len(family) > limits.processes + OWN_PROCESSES:
        return "processes"
    total = 0
    for member in family:
        try:
            # Shared pages count in parts; a sum of resident sizes would count them many times.
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return "memory" if total > limits.memory else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Has the launcher kill what is left, and kills it too if it does not end."""
    process.terminate()
    try:
        process.wait(KILL_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
