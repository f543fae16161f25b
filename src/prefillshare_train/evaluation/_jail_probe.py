"""Tries, inside the sandbox, what a program must not be able to do, and prints what it could.

Run as a script, standard library only: `_jail_probe.py CANARY PROCESSES DISK`, where CANARY is a
file outside the sandbox, writable by everyone in a folder writable by everyone, and the others are
limits.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path


def reaches_network() -> bool:
    """A route to anywhere (nothing is sent) or to the machine itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward, suppress(OSError):
        outward.connect(("192.0.2.1", 9))
        return True
    with socket.socket() as server, socket.socket() as client, suppress(OSError):
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.settimeout(2)
        client.connect(server.getsockname())
        return True
    return False


def reads(path: Path) -> bool:
    with suppress(OSError):
        path.read_bytes()
        return True
    return False


def writes(path: Path) -> bool:
    """Whether the canary or a new file beside it could be written."""
    for target in (path, path.with_name("new")):
        with suppress(OSError):
            target.write_text("written from inside the sandbox")
            return True
    return False


def exceeds_processes(allowed: int) -> bool:
    """Whether one process more than allowed could be started, this one included."""
    started: list[int] = []
    try:
        while len(started) < allowed:
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            started.append(pid)
    except OSError:
        return False
    finally:
        for pid in started:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return True


def main() -> None:
    canary, allowed, disk = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    volume = os.statvfs(".")
    facts = {
        "no_network": not reaches_network(),
        "no_writes_outside": not writes(canary),
        "no_reads_outside": not reads(canary),
        "process_limit": not exceeds_processes(allowed),
        # The init of a process namespace is its first process and the command its second.
        "process_namespace": os.getpid() == 2,
        "disk_limit": volume.f_blocks * volume.f_frsize <= disk,
        "memory_limit": resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY,
        "cpu_limit": resource.getrlimit(resource.RLIMIT_CPU)[0] != resource.RLIM_INFINITY,
        "file_size_limit": resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
