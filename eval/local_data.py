"""Data of the task files in this folder: JSON lines on disk, so that nothing is fetched.

lm-eval calls `jsonl` with a task's `metadata`, into which it merges the `--metadata` and the
`--model_args` of its command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

DATA_DIR_VARIABLE = "PREFILLSHARE_EVAL_DATA"
DEFAULT_DATA_DIR = "../shared/data"


def jsonl(
    data_file: str,
    columns: Sequence[str],
    data_dir: str | None = None,
    train_file: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Read a task's rows.

    Args:
        data_file: the file, below the data directory.
        columns: what every row must have, as text.
        data_dir: from `--metadata data_dir=DIR`; else the environment's PREFILLSHARE_EVAL_DATA,
            else `../shared/data`.
        train_file: a file of further rows, for examples.

    Returns:
        The split `test`, and `train` where it is named, in the files' order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON or lacks a column, or the file has no rows.
    """
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR
    files = {"test": data_file} | ({"train": train_file} if train_file else {})
    return {split: _split(Path(folder), name, columns) for split, name in files.items()}


def _split(folder: Path, name: str, columns: Sequence[str]) -> datasets.Dataset:
    path = folder.expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. Name the directory that holds {name} with "
            f"prefillshare eval --data DIR, lm-eval --metadata data_dir=DIR, or {DATA_DIR_VARIABLE}"
        )
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(line, columns, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return datasets.Dataset.from_list(rows)


def _row(line: str, columns: Sequence[str], origin: str) -> dict[str, str]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{origin}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected an object, found {type(values).__name__}")
    for column in columns:
        if not isinstance(values.get(column), str):
            raise ValueError(
                f"{origin}: {column!r} must be text, found {values.get(column)!r}; "
                f"the columns are {', '.join(map(repr, values))}"
            )
    return {column: values[column] for column in columns}
