"""One block's file: how it is opened, marked as used, and told from a damaged one."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@contextlib.contextmanager
def opened_block(path: Path) -> Iterator[Any]:
    """A block's file for `safetensors`, whole even where it is evicted meanwhile.

    `safe_open` opens the name it is given twice, for the header and then, by torch, for the tensor.
    The descriptor's own name leads to one file whatever happens to the block's.
    """
    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", "pt") as opened:
        yield opened


def touch_file(path: Path) -> None:
    """Make it the most recently used."""
    # The file system's own clock is too coarse to tell a prompt's blocks apart.
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def checksum(block: Tensor) -> int:
    """CRC-32 of its bytes."""
    return zlib.crc32(block.flatten().view(torch.uint8).numpy().data)
