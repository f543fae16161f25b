"""Installed packages: what is required, and what is known not to work together."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.requirements import Requirement

_PACKAGE = "prefillshare-train"
_OPTIONAL = ("deepspeed", "vllm", "lm-eval", "gguf", "trl", "bitsandbytes", "liger-kernel")
_SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface-hub")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `ok`, `note` (works, or matters to some), or `bad`.
        subject: what was looked at.
        found: what is there.
        fix: what to do about it; empty where there is nothing to do.
    """

    level: Literal["ok", "note", "bad"]
    subject: str
    found: str
    fix: str = ""


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> list[Requirement]:
    """What an installed distribution asks for, extras left out."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def package_versions() -> Iterator[Finding]:
    """Our own requirements, one by one where they are not met, and what else matters."""
    shown = f"{platform.python_version()} on {platform.system()}"
    yield Finding("ok", "python", shown)
    yield Finding("ok", _PACKAGE, installed(_PACKAGE) or "not installed")
    for requirement in requirements(_PACKAGE):
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                "bad",
                requirement.name,
                f"{found or 'missing'}; {requirement.specifier or 'any version'} is needed",
                f"pip install '{requirement}'",
            )
        elif requirement.name in _SHOWN:
            yield Finding("ok", requirement.name, found)
    for name in _OPTIONAL:
        found = installed(name)
        if found is not None:
            yield Finding("ok", f"{name} (optional)", found)


def known_conflicts() -> Iterator[Finding]:
    """Combinations that fail late, or silently."""
    found = [*_torch_companions(), *_harnesses(), *_deepspeed(), *_vllm(), *_accelerate()]
    if not found:
        yield Finding("ok", "conflicts", "none of those known")
    yield from found


def _torch_companions() -> Iterator[Finding]:
    """torchvision and torchaudio of another torch break imports of transformers and vLLM."""
    torch = installed("torch")
    for name in ("torchvision", "torchaudio"):
        for requirement in requirements(name):
            if requirement.name != "torch" or torch is None:
                continue
            if not requirement.specifier.contains(torch, prereleases=True):
                yield Finding(
                    "bad",
                    name,
                    f"{installed(name)} is built for torch {requirement.specifier}, not {torch}",
                    f"pip uninstall {name} (nothing here needs it)",
                )


def _harnesses() -> Iterator[Finding]:
    if installed("bfcl-eval"):
        yield Finding(
            "bad",
            "bfcl-eval",
            "pins numpy 1.26 and tree-sitter 0.21, which evalplus and this package cannot share",
            "pip uninstall bfcl-eval: `prefillshare eval` makes an environment for it by itself",
        )


def _deepspeed() -> Iterator[Finding]:
    if installed("deepspeed") is None:
        return
    if shutil.which("ninja") is None:
        yield Finding(
            "bad",
            "deepspeed",
            "compiles at run time and finds no ninja on the PATH",
            "activate the virtual environment (its bin holds ninja), or pip install ninja",
        )
    if all(shutil.which(name) is None for name in ("c++", "g++", "clang++")):
        yield Finding(
            "bad", "deepspeed", "compiles at run time and finds no C++ compiler", "install g++"
        )


def _vllm() -> Iterator[Finding]:
    if installed("vllm") is None:
        return
    yield Finding(
        "note",
        "vllm",
        "stock vLLM refuses adapters in aLoRA format, and its offline mode dies of them",
        "serve them by prefillshare vllm up, or export with --format hf",
    )
    if installed("lm-eval") or installed("deepspeed"):
        yield Finding(
            "note",
            "vllm",
            "shares an environment with training packages, whose torch it pins",
            "give vLLM a virtual environment of its own",
        )


def _accelerate() -> Iterator[Finding]:
    """A default configuration of accelerate changes every launch that names none."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = home / "accelerate" / "default_config.yaml"
    if not path.is_file():
        return
    try:
        settings: Any = yaml.safe_load(path.read_text())
        kind, processes = settings["distributed_type"], settings["num_processes"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        yield Finding(
            "bad", "accelerate", f"{path} cannot be read", "run accelerate config, or remove it"
        )
        return
    yield Finding(
        "note",
        "accelerate",
        f"{path} is read by every `accelerate launch` that names no file: {kind}, "
        f"{processes} processes",
        "name one: accelerate launch --config_file …",
    )
    if settings.get("use_cpu") and kind == "DEEPSPEED":
        yield Finding(
            "bad",
            "accelerate",
            f"{path} asks for DeepSpeed with use_cpu: accelerate silently trains with DDP",
            "set use_cpu to false there",
        )
