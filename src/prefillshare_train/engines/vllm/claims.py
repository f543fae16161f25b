"""TCP ports that one `prefillshare vllm up` holds, so that a second one is told so.

A file a port holds who has it. It is locked for as long as the process lives; the kernel lets go of
the lock however the process ends, so that what a killed one left behind claims nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from prefillshare_train.engines.vllm.errors import VllmError

_STATE = "XDG_STATE_HOME"


def state_folder() -> Path:
    """Where the files lie: `prefillshare/vllm` in the user's folder for state."""
    home = os.environ.get(_STATE)
    return (Path(home) if home else Path.home() / ".local" / "state") / "prefillshare" / "vllm"


@contextlib.contextmanager
def claimed(host: str, ports: Sequence[int], about: dict[str, Any]) -> Iterator[None]:
    """Hold ports for the length of a block.

    Args:
        host: address that will be listened on.
        about: what a second one is told, beside the process id: JSON values. `logs` is shown.

    Raises:
        VllmError: one is claimed by a running `up`, or listened on by anything else, or the files
            cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for port in sorted(ports):
            stack.enter_context(_lock(port, about))
        for port in ports:
            require_free(host, port)
        yield


@contextlib.contextmanager
def _lock(port: int, about: dict[str, Any]) -> Iterator[None]:
    path = state_folder() / f"{port}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise VllmError(f"{path} cannot be written: {error}; set {_STATE}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise VllmError(_held(port, file)) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), **about}, file, indent=2)
        file.flush()
        try:
            yield
        finally:
            # Emptied, not removed: a file that was removed can be locked by two at once.
            file.truncate(0)


def _held(port: int, file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return (
            f"port {port} belongs to a running `prefillshare vllm up`, process {holder['pid']} "
            f"(logs in {holder.get('logs')}). Stop it (kill {holder['pid']}), or choose other "
            "ports with --port and --instance-port"
        )
    except (ValueError, KeyError):  # it has just taken it
        return f"port {port} belongs to another `prefillshare vllm up`; choose other ports"


def require_free(host: str, port: int) -> None:
    """Check that nobody listens on a port.

    Raises:
        VllmError: somebody does, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((host, port))
        except OSError as error:
            raise VllmError(
                f"{host}:{port} cannot be listened on ({error.strerror or error}); stop what "
                "listens there, or choose other ports with --port and --instance-port"
            ) from None
