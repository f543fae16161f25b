"""Decoder folders with contracts and no weights: enough for what is checked before a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefillshare_train.core.contract import Contract


def write_contract(folder: Path, **values: Any) -> Path:
    settings: dict[str, Any] = {
        "base_id": "the-base",
        "base_revision": None,
        "base_fingerprint": "sha256:" + "0" * 64,
        "cache_config": {"model_type": "llama"},
        "prompt": {},
        "boundary": "last_token",
        "kv_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    Contract(**(settings | values)).save(folder)
    return folder


def full_decoder(folder: Path, **contract: Any) -> Path:
    write_contract(folder, **contract)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def lora_decoder(folder: Path, *, adapter: dict[str, Any] | None = None, **contract: Any) -> Path:
    write_contract(folder, adapter="lora", **contract)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | (adapter or {})))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder
