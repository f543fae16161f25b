"""The machine that figures were measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch


def machine(device: str | None = None) -> str:
    """Processor and its vector instructions, cores, threads, memory, torch version, accelerator.

    Args:
        device: that was computed on; None for the GPU where there is one.
    """
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    parts = [
        f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        f"{memory:.0f} GiB",
        f"torch {torch.__version__}",
    ]
    if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join(parts)
