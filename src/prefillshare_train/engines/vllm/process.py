"""One server process: its log, readiness, and a stop that leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from prefillshare_train.engines.vllm.errors import VllmError

_SHOWN_LINES = 25
_POLL_S = 0.25


class InstanceError(VllmError):
    """A server process ended, or was not ready in time; the message has its last log lines."""


class ServerProcess:
    """A server, from its start to its end. Usable as a context manager.

    Not thread-safe: one owner starts, polls and stops it. Can be started again after a stop.

    Args:
        name: what messages call it.
        command: what runs it.
        variables: environment variables beside the inherited ones.
        url: its base URL; `/health` under it answers 200 once it is ready.
        log: where its output goes; appended to, so that a restart keeps what came before.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        variables: Mapping[str, str],
        url: str,
        log: Path,
    ) -> None:
        self.name = name
        self.url = url
        self.log = log
        self._command = list(command)
        self._variables = dict(variables)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id from the start to the stop."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and return; `is_ready` and `wait_until_ready` tell when it serves.

        Raises:
            VllmError: the command cannot be run, or the log cannot be written.
        """
        if self._process is not None:
            raise RuntimeError(f"{self.name} was started already")
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                self._log_start = output.tell()
                # A session of its own: a Ctrl-C meant for the supervisor does not reach it, and
                # the engine's processes can be ended with it, all at once.
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._variables},
                    start_new_session=True,
                )
        except OSError as error:
            raise VllmError(f"{self.name} cannot be started: {error}") from error

    def exit_code(self) -> int | None:
        """As `subprocess` tells it: -N after signal N. None before the start and while it runs."""
        if self._process is None:
            return None
        # Looked at and not reaped: until `stop`, no stranger can get its process group's number.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self._process.pid, flags)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def is_ready(self) -> bool:
        """Whether it runs and answers its health check with 200."""
        # The standard library's client: others load certificates each time, which this never needs.
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=2.0)
        try:
            connection.request("GET", "/health")
            answered = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        # An answer may come from a stranger on that port, while ours failed to bind it.
        return answered and self._process is not None and self.exit_code() is None

    def require_running(self) -> None:
        """Check that it has not ended.

        Raises:
            InstanceError: it has; with its last log lines.
        """
        code = self.exit_code()
        if code is not None:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            raise InstanceError(f"{self.name} has ended {how}. {self._shown()}")

    def last_lines(self, count: int = _SHOWN_LINES) -> str:
        """The end of what it has written since its start, indented."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - 64 * 1024))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"  (cannot be read: {error})"
        return "\n".join(f"  {line}" for line in lines[-count:]) or "  (empty)"

    def stop(self, grace_s: float = 20.0) -> None:
        """End it and every process that it started. Does nothing where there is none.

        Args:
            grace_s: seconds between the request to end and the kill.
        """
        process = self._process
        if process is None:
            return
        try:
            if self.exit_code() is None:
                process.terminate()
                end = time.monotonic() + grace_s
                while self.exit_code() is None and time.monotonic() < end:
                    time.sleep(0.05)
        finally:
            # The whole group, also when the server has ended by itself: its engine may not have.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _shown(self) -> str:
        return f"The last lines of {self.log}:\n{self.last_lines()}"


def wait_until_ready(
    processes: Sequence[ServerProcess],
    *,
    timeout_s: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Wait until every process is ready.

    Args:
        timeout_s: seconds for all of them together.
        should_stop: asked several times a second; True ends the wait.

    Returns:
        False where `should_stop` ended it.

    Raises:
        InstanceError: one has ended, or is not ready in time; with its last log lines.
    """
    waiting = list(processes)
    end = time.monotonic() + timeout_s
    while True:
        for process in processes:
            process.require_running()
        waiting = [process for process in waiting if not process.is_ready()]
        if not waiting:
            return True
        if time.monotonic() > end:
            late = waiting[0]
            raise InstanceError(
                f"{late.name} did not answer {late.url}/health within {timeout_s:g} s. A large "
                f"model may need longer. {late._shown()}"
            )
        if should_stop():
            return False
        time.sleep(_POLL_S)
