"""Builds the jail of `sandbox.py` and runs one command in it; a script, standard library only.

With namespaces there are four processes, each started by the one before:

    launcher   this script; outlives the rest and kills what is left of them
    gate       has entered new user, mount, process, network, IPC and host name namespaces
    init       process 1 of the new process namespace: when it ends, the kernel kills all inside
    command    what was asked for, without any privilege

Without them the launcher starts the command itself. The job comes as JSON on one file descriptor,
the report leaves as JSON on another; the command sees neither.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NOBODY = 65534
SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /nix/store /etc/ld.so.cache /etc/alternatives".split()
DEVICES = "null zero full random urandom".split()

libc = ctypes.CDLL(None, use_errno=True)


class Stopped(BaseException):
    """The sandbox asked for the end, or its process is gone."""


def call(name: str, *arguments: Any) -> None:
    """A libc function that returns -1 on failure."""
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind, options)]
    call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def restrict(path: str, attributes: int, flags: int = 0) -> None:
    """Adds attributes to a mount (and with AT_RECURSIVE to those below it); kernel 5.12 on."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, wanted, 32)


def show(source: str, target: str) -> None:
    """Binds `source` of the old root read-only to `target` of the new one."""
    hidden = Path("/old" + source)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if hidden.is_dir():
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()
    mount(str(hidden), target, "", MS_BIND | MS_REC)
    restrict(target, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, AT_RECURSIVE)


def covered(source: str, target: str, shown: dict[str, str]) -> bool:
    """Whether a folder that is shown already brings `source` to `target`."""
    for folder, origin in shown.items():
        inside = target == folder or target.startswith(folder + "/")
        if inside and source == origin + target[len(folder) :]:
            return True
    return False


def build_root(job: dict[str, Any]) -> None:
    """A root of its own: system and Python read-only, three small memory disks, nothing else."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Nothing inside may make namespaces in turn; some containers keep /proc/sys read-only.
    with suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    Path("/tmp/old").mkdir()
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    # First of all: the Python installation may lie inside one of these.
    for path in (job["work"], "/tmp", "/dev/shm"):
        Path(path).mkdir(parents=True)
        size = f"size={job['disk']},nr_inodes=4096,mode=700,uid={NOBODY},gid={NOBODY}"
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, size)
    shown: dict[str, str] = {}
    for path in SYSTEM:
        hidden = Path("/old" + path)
        if hidden.is_symlink():
            Path(path).symlink_to(hidden.readlink())
        elif hidden.exists():
            show(path, path)
            shown[path] = path
    for source, target in sorted(job["readable"], key=lambda pair: pair[1]):
        if not covered(source, target, shown):
            show(source, target)
            shown[target] = source
    Path("/proc").mkdir()
    # Containers that mask parts of /proc forbid a new one; programs do without it.
    with suppress(OSError):
        mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in DEVICES:
        Path("/dev", name).touch()
        mount(f"/old/dev/{name}", f"/dev/{name}", "", MS_BIND)
    call("umount2", b"/old", MNT_DETACH)
    Path("/old").rmdir()
    restrict("/", ATTR_RDONLY)


def write_files(job: dict[str, Any]) -> None:
    for name, content in job["files"].items():
        path = Path(job["work"], name)
        path.write_bytes(base64.b64decode(content))
        if job["uid"] is not None:
            os.chown(path, job["uid"], job["uid"])


def read_files(job: dict[str, Any]) -> dict[str, str]:
    """Files that the command left; a link, a pipe or a large file counts as absent."""
    found = {}
    for name in job["collect"]:
        with suppress(OSError):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(Path(job["work"], name), flags), "rb") as file:
                size = os.fstat(file.fileno())
                if stat.S_ISREG(size.st_mode) and size.st_size <= job["disk"]:
                    found[name] = base64.b64encode(file.read()).decode()
    return found


def threads_of(uid: int) -> int:
    """Threads that run as `uid`: outside of namespaces the limit counts these too."""
    count = 0
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(list((entry / "task").iterdir()))
    return count


def become_command(job: dict[str, Any], report: int) -> NoReturn:
    """Gives up everything and turns into the command."""
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        stdin = os.memfd_create("stdin")
        os.write(stdin, base64.b64decode(job["stdin"]))
        os.lseek(stdin, 0, os.SEEK_SET)
        os.dup2(stdin, 0)
        limits = dict(job["rlimits"])
        if not job["namespaces"]:
            limits["RLIMIT_NPROC"] += threads_of(os.getuid() if job["uid"] is None else job["uid"])
        for name, value in limits.items():
            limit = getattr(resource, name)
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if job["uid"] is not None:
            os.setgroups([])
            os.setresgid(job["uid"], job["uid"], job["uid"])
            os.setresuid(job["uid"], job["uid"], job["uid"])
        os.chdir(job["work"])
        os.execve(job["command"][0], job["command"], job["env"])
    except BaseException as error:
        send(report, {"error": f"cannot start {job['command'][0]}: {error}"})
    os._exit(127)


def run_command(job: dict[str, Any], report: int) -> int:
    """Starts the command and returns its wait status; reaps strays on the way."""
    write_files(job)
    command = os.fork()
    if command == 0:
        become_command(job, report)
    while True:
        pid, status = os.wait()
        if pid == command:
            return status


def be_init(job: dict[str, Any], report: int) -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Signals without a handler do not reach process 1 from inside its namespace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    build_root(job)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    status = run_command(job, report)
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    send(report, {"status": status, "files": read_files(job)})


def be_gate(job: dict[str, Any], report: int, ready: int, go: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    call("unshare", NEW_NAMESPACES)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.write(ready, b"1")
    if os.read(go, 1) != b"1":
        raise OSError("the user namespace got no user ids")
    init = os.fork()
    if init == 0:
        guarded(be_init, job, report)
    os.waitpid(init, 0)


def guarded(body: Any, job: dict[str, Any], report: int, *arguments: int) -> NoReturn:
    """The whole life of a forked helper: an error goes into the report, never up the stack."""
    try:
        body(job, report, *arguments)
    except BaseException as error:
        send(report, {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def launch(job: dict[str, Any], report: int) -> None:
    if not job["namespaces"]:
        if job["uid"] is not None:
            os.chown(job["work"], job["uid"], job["uid"])
        status = run_command(job, report)
        sweep()
        send(report, {"status": status, "files": read_files(job)})
        return
    (ready, ready_end), (go_end, go) = os.pipe(), os.pipe()
    gate = os.fork()
    if gate == 0:
        os.close(go)
        guarded(be_gate, job, report, ready_end, go_end)
    os.close(ready_end)
    if os.read(ready, 1) == b"1":
        for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
            if job["uid"] is None:
                if kind == "gid":
                    Path(f"/proc/{gate}/setgroups").write_text("deny")
                lines = f"{NOBODY} {own} 1\n"
            else:
                lines = f"0 {own} 1\n{job['uid']} {job['uid']} 1\n"
            Path(f"/proc/{gate}/{kind}_map").write_text(lines)
        os.write(go, b"1")
    os.waitpid(gate, 0)


def send(report: int, message: dict[str, Any]) -> None:
    """The first message stays: an error is not overwritten by what follows from it."""
    if os.fstat(report).st_size == 0:
        os.pwrite(report, json.dumps(message).encode(), 0)


def descendants() -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def sweep() -> None:
    """Kills every descendant; orphans come to this process, so that none is missed."""
    while pids := descendants():
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.005)


def stop(number: int, frame: Any) -> NoReturn:
    raise Stopped


def main() -> None:
    source, report = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(report, False)
    with os.fdopen(source, "rb") as file:
        job = json.load(file)
    os.umask(0o022)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, job["backstop"])
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != job["parent"]:
        return
    try:
        launch(job, report)
    except Stopped:
        pass
    except OSError as error:
        send(report, {"error": f"{type(error).__name__}: {error}"})
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        sweep()


if __name__ == "__main__":
    main()
