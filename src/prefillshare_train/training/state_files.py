"""Optimizer, scheduler and generator states as safetensors and JSON, so that nothing is unpickled.

JSON keeps every float exactly (Python writes the shortest text that reads back to the same bits).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.json"


def save_optimizer(state: dict[str, Any], folder: Path) -> None:
    """Write an optimizer's `state_dict()` as `optimizer.safetensors` and `optimizer.json`.

    Raises:
        TypeError: the state holds something that is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{name}"] = value.detach().contiguous()
            else:
                plain.setdefault(str(number), {})[name] = value
    text = json.dumps({"state": plain, "param_groups": state["param_groups"]})
    save_file(tensors, folder / f"{OPTIMIZER}.safetensors")
    (folder / f"{OPTIMIZER}.json").write_text(text)


def load_optimizer(folder: Path) -> dict[str, Any]:
    """What `save_optimizer` wrote, for `load_state_dict`. Tensors are on the CPU."""
    held = json.loads((folder / f"{OPTIMIZER}.json").read_text())
    state: dict[int, dict[str, Any]] = {int(n): dict(v) for n, v in held["state"].items()}
    for key, tensor in load_file(folder / f"{OPTIMIZER}.safetensors").items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in held["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def save_generators(path: Path) -> None:
    """Write the states of Python's, numpy's, torch's and every CUDA device's generator."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda/{number}"] = state
    plain = {"python": random.getstate(), "numpy": [name, position, has_gauss, cached]}
    save_file(tensors, path, metadata={"states": json.dumps(plain)})


def load_generators(path: Path) -> None:
    """Set every generator to what `save_generators` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        plain = json.loads(file.metadata()["states"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch"])
    for number in range(torch.cuda.device_count()):
        if f"cuda/{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{number}"], number)
