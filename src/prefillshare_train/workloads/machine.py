"""The machine that figures were measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch


def machine() -> str:
    """Processor, cores, threads, memory and torch version; the accelerator where one is used."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    parts = [
        name,
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        f"{memory:.0f} GiB",
        f"torch {torch.__version__}",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)
