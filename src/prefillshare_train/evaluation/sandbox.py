"""Runs programs that a model wrote: no network, nothing to break, and an end that is certain.

`Sandbox()` tries what the system allows, from the strongest kind to the weakest, and probes the
first that works by attempting what a program must not do; `protections()` says what was found.

Namespaces (any user, on most Linux kernels from 5.12 on; containers often forbid them). A program
sees a root of its own: the system folders and the Python installation read-only, an empty working
folder and /tmp in memory, no network device that is up, no other processes. When its first process
ends, or a limit is passed, the kernel kills all others, however they were started.

Limits alone (only with `allow_network=True`). Resource limits, a temporary folder, a clean
environment, another user where we are root; all descendants are killed at the end.

In both, the sandbox watches total memory and the number of processes from outside, so that many
processes cannot take together what one may not.

What it is not: a defence against an attack on the kernel. And no check that runs in the same
process as the program under test is proof against a program that is written to deceive it: see
`Sandbox.run_program`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.jail import Kind, Limits, Outcome, run_jailed
from prefillshare_train.evaluation.task import EvaluationError

__all__ = ["Limits", "Outcome", "Sandbox"]

PROBE = Path(__file__).with_name("_jail_probe.py").read_text()
BOOTSTRAP = Path(__file__).with_name("_jail_bootstrap.py").read_text()
NOBODY = 65534


class Sandbox:
    """A place to run untrusted programs; several runs may go on at one time, from threads.

    Args:
        limits: what a run may use, unless the run says otherwise.
        allow_network: accept a system that offers no namespaces: programs then reach the network,
            may read what the user may read, and write where the user may write. A warning names
            what is missing.

    Raises:
        EvaluationError: nothing works here, or only what needs `allow_network`.
    """

    def __init__(self, limits: Limits | None = None, *, allow_network: bool = False) -> None:
        self.limits = limits or Limits()
        if sys.platform != "linux":
            raise EvaluationError(
                f"model-written code is run on Linux only, this is {sys.platform}; generate here "
                "and judge the outputs on a Linux machine or in a virtual machine"
            )
        self._kind, self._facts, refused = self._first_that_works()
        if self._kind.namespaces and self._facts["no_network"]:
            return
        why = f"no namespaces can be used here ({'; '.join(refused) or 'the network is reachable'})"
        if not allow_network:
            raise EvaluationError(
                f"model-written code cannot be kept off the network: {why}. Allow unprivileged "
                "user namespaces (sysctl user.max_user_namespaces; in Docker: --security-opt "
                "seccomp=unconfined), use a virtual machine, or accept the risk explicitly with "
                "allow_network"
            )
        missing = ", ".join(name for name, active in self._facts.items() if not active)
        warnings.warn(
            f"model-written code runs with weak protection, {why}; missing: {missing}",
            stacklevel=2,
        )

    def protections(self) -> dict[str, bool]:
        """What programs were found unable to do, each tried at run time inside this sandbox."""
        return dict(self._facts)

    def describe(self) -> dict[str, Any]:
        """Kind, protections and limits, for reports."""
        return {
            "kind": str(self._kind),
            "protections": self.protections(),
            "limits": asdict(self.limits),
        }

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        collect: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Outcome:
        """Runs a command to its end or to a limit; then nothing of it is left.

        Args:
            command: absolute path of a program and its arguments.
            stdin: what it may read; then the end of file.
            files: by name, put into its working folder.
            collect: names of files in its working folder to bring back.
            env: additions to the clean environment.
            limits: instead of the sandbox's own.

        Raises:
            EvaluationError: the sandbox could not start; never for what the command does.
        """
        return run_jailed(
            self._kind,
            command,
            limits or self.limits,
            stdin=stdin,
            files=files,
            collect=collect,
            env=env,
        )

    def run_program(
        self,
        program: str,
        *,
        files: Mapping[str, bytes] | None = None,
        collect: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Outcome:
        """Runs Python source as `__main__`; `Outcome.finished` says that its last line was passed.

        An exit status proves nothing: `os._exit(0)` and `sys.exit()` in the middle give 0 as well.
        So a parent process inside the sandbox, which holds a random word that we look for in the
        output, says the word only after the child that runs the program has sent back, on a pipe,
        a second random word that it was given. Neither word is in an argument, the environment, a
        file or standard input of the program. A program that dumps its stack shows the child's word
        only, which means nothing in the output. One that searches the stack for both the word and
        the pipe can still deceive: it shares its process with its judge, here as in every harness
        that calls the tested function in place.

        Raises:
            EvaluationError: the sandbox could not start.
        """
        proof = secrets.token_hex(32)
        outcome = self.run(
            [sys.executable, "-c", BOOTSTRAP],
            stdin=proof.encode(),
            files={**(files or {}), "program.py": program.encode(errors="replace")},
            collect=collect,
            env=env,
            limits=limits,
        )
        if not outcome.output.endswith(proof):
            return outcome
        finished = outcome.returncode == 0 and not outcome.stopped
        return replace(outcome, output=outcome.output.removesuffix(proof), finished=finished)

    def _first_that_works(self) -> tuple[Kind, dict[str, bool], list[str]]:
        users = [NOBODY, None] if os.geteuid() == 0 else [None]
        refused: list[str] = []
        for kind in [Kind(namespaces, uid) for namespaces in (True, False) for uid in users]:
            facts, why = self._probe(kind)
            if facts:
                return kind, facts, refused
            refused.append(why)
        raise EvaluationError(f"no sandbox works here: {'; '.join(refused)}")

    def _probe(self, kind: Kind) -> tuple[dict[str, bool], str]:
        """What is active in a sandbox of this kind; or nothing and why it does not work."""
        folder = Path(tempfile.mkdtemp(prefix="prefillshare-canary-"))
        canary = folder / "canary"
        outcome = None
        try:
            canary.write_text("alive")
            folder.chmod(0o777)
            canary.chmod(0o666)
            limits = [str(self.limits.processes), str(self.limits.disk)]
            command = [sys.executable, "-c", PROBE, str(canary), *limits]
            outcome = run_jailed(kind, command, self.limits)
            facts: dict[str, bool] = json.loads(outcome.output)
            unchanged = canary.read_text() == "alive" and list(folder.iterdir()) == [canary]
            facts["no_writes_outside"] &= unchanged
        except EvaluationError as error:
            return {}, str(error)
        except ValueError:
            return {}, f"the probe of {kind} ended with {outcome}"
        finally:
            shutil.rmtree(folder)
        return facts, ""
