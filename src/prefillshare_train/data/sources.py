"""From a source to rows in normal form; every bad row is found before anything else is done."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefillshare_train.data import adapters, formats
from prefillshare_train.data.columns import unread_columns
from prefillshare_train.data.config import SourceConfig
from prefillshare_train.data.errors import DataError, RowError
from prefillshare_train.data.readers import read_records, require_path
from prefillshare_train.data.rows import Record, Row
from prefillshare_train.data.seal_tools import SealTools

RowMaker = Callable[[Record], Row | None]

FORMATS: dict[str, RowMaker] = {
    "messages": formats.messages,
    "prompt_completion": formats.prompt_completion,
    "sharegpt": formats.sharegpt,
    "alpaca": formats.alpaca,
    "metamath": adapters.metamath,
    "evol_instruct_code": adapters.evol_instruct_code,
    "xlam": adapters.xlam,
    "gsm8k": adapters.gsm8k,
    "mbpp": adapters.mbpp,
    "react": adapters.react,
}
_SHOWN_ERRORS = 10


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """Rows of one source.

    Attributes:
        rows: in file order.
        format: the format that was used.
        rows_read: rows in the source.
        filtered: rows that the format leaves out (unsolved MBPP problems).
        unread: columns that hold something and that the format does not read.
    """

    rows: list[Row]
    format: str
    rows_read: int
    filtered: int
    unread: tuple[str, ...] = ()


def load_rows(
    source: SourceConfig,
    *,
    base_dir: Path,
    seed: int = 0,
) -> LoadedRows:
    """Read, check and normalise a source, then draw its sample.

    Args:
        base_dir: where relative paths are looked up after the current directory.
        seed: of the sample and of distractor tools.

    Raises:
        DataError: the source cannot be read or is empty, or rows are bad: the message lists the
            first of them with file and row number.
    """
    maker: RowMaker | None = None
    name: str = source.format
    rows: list[Row] = []
    errors: list[RowError] = []
    unread: dict[str, None] = {}  # a set that keeps its order
    read = 0
    for record in read_records(source, base_dir):
        read += 1
        try:
            if isinstance(record, RowError):
                raise record
            record = _renamed(record, source.columns)
            if maker is None:
                name, maker = _maker(source, record, base_dir, seed)
            unread |= dict.fromkeys(unread_columns(record, name))
            row = maker(record)
        except RowError as error:
            errors.append(error)
            continue
        if row is not None:
            rows.append(row)
    if errors:
        raise DataError(_listing(errors, read))
    if not rows:
        raise DataError(f"source: {source.source} has no usable row ({read} read)")
    filtered = read - len(rows)
    if source.sample is not None and source.sample < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), source.sample))
        rows = [rows[index] for index in chosen]
    return LoadedRows(rows, name, read, filtered, tuple(unread))


def _renamed(record: Record, columns: dict[str, str] | None) -> Record:
    if not columns:
        return record
    missing = [old for old in columns.values() if old not in record.values]
    if missing:
        raise RowError(
            record.origin,
            f"columns names {', '.join(map(repr, missing))}; found "
            f"{', '.join(map(repr, record.values))}",
            "Correct columns",
        )
    kept = {key: value for key, value in record.values.items() if key not in columns.values()}
    kept |= {new: record.values[old] for new, old in columns.items()}
    return Record(kept, record.origin, record.index)


def _maker(source: SourceConfig, record: Record, base_dir: Path, seed: int) -> tuple[str, RowMaker]:
    name: str = source.format
    if name == "auto":
        name = formats.detect_format(record.values, record.origin)
    if name == "seal_tools":
        if source.tools_file is None:
            raise DataError(
                "format seal_tools needs tools_file, the JSONL file of API specifications "
                "(tool.jsonl in the data set)"
            )
        tools_file = require_path(source.tools_file, base_dir, "tools_file")
        try:
            return name, SealTools(tools_file, source.distractors, seed).row
        except RowError as error:
            # A bad pool is not a bad row, which would be collected and the pool read again.
            raise DataError(f"tools_file: {error}") from error
    if source.tools_file is not None or source.distractors:
        raise DataError(
            f"tools_file and distractors are read by format seal_tools only, but the format of "
            f"{source.source} is {name}. Remove them"
        )
    return name, FORMATS[name]


def _listing(errors: list[RowError], read: int) -> str:
    lines = [f"{len(errors)} of {read} rows are bad:"]
    lines += [f"  {error}" for error in errors[:_SHOWN_ERRORS]]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  ... and {len(errors) - _SHOWN_ERRORS} more")
    return "\n".join(lines)
