"""The base's fingerprint, read off its weights' files.

An instance must know which base it serves before vLLM has loaded it, and a decoder's instance never
loads it at all. Reading every weight of a large base takes a while, so the result is kept in the
user's cache until a file of the base changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prefillshare_train.core.contract import fingerprint_of, weights_fingerprint
from prefillshare_train.engines.vllm.errors import VllmError


def base_folder(base: str, revision: str | None = None) -> Path:
    """The folder of a base, fetched from the hub where it is not a folder itself.

    Raises:
        VllmError: it is neither a folder nor a hub id that can be reached.
    """
    folder = Path(base)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.safetensors", "*.json"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))
    except (OSError, HFValidationError, ValueError) as error:
        raise VllmError(
            f"the base {base!r} is neither a folder nor a hub id that can be fetched: {error}"
        ) from None


def base_fingerprint(base: str, revision: str | None = None) -> str:
    """`core.contract.weights_fingerprint` of a base.

    Args:
        base: folder or hub id.

    Raises:
        VllmError: there is no such base, or it has no safetensors weights.
    """
    folder = base_folder(base, revision)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise VllmError(f"{folder} has no *.safetensors: weights are read from no other format")
    kept = _cache_folder() / f"{_identity(folder, files)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(kept.read_text())["fingerprint"])
    fingerprint = _of_files(folder, files)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as beside:
            beside.write(json.dumps({"base": str(folder.resolve()), "fingerprint": fingerprint}))
        Path(beside.name).replace(kept)
    return fingerprint


def base_config(base: str) -> PreTrainedConfig:
    """Configuration of a base's text part.

    Raises:
        VllmError: there is no such base, or it has none that can be read.
    """
    folder = base_folder(base)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise VllmError(f"config.json of the base in {folder} cannot be read: {error}") from error
    return config


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prefillshare" / "fingerprints"


def _identity(folder: Path, files: Iterable[Path]) -> str:
    """Of the files as they are now: places, sizes, times of change."""
    seen = [str(folder.resolve())]
    for file in (folder / "config.json", *files):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            seen.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:32]


def _of_files(folder: Path, files: list[Path]) -> str:
    """One tensor at a time, where files and model call them alike; off the whole model else."""
    place: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(str(file), "pt") as opened:
                place |= dict.fromkeys(opened.keys(), file)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = dict(model.named_parameters())
        if all(name in place for name in names):
            return fingerprint_of(names, lambda name: _read(place[name], name))
        whole = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise VllmError(f"the base in {folder} cannot be read: {error}") from error
    return weights_fingerprint(whole)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(str(file), "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
