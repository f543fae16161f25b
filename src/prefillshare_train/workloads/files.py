"""Files that are complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, put it on disk, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".unfinished-{path.name}")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Complete or not at all."""
    write_with(path, lambda beside: beside.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Complete or not at all; NaN and infinity, which JSON lacks, are an error."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
