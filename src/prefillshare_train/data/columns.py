"""Which columns each format reads, and what becomes of the others.

Most others are labels that nobody misses, and are listed in the report. A few hold what the model
was told before it answered: trained without them, it learns answers that do not follow.
"""

from __future__ import annotations

from typing import Any

from prefillshare_train.data.errors import RowError, shorten
from prefillshare_train.data.rows import Record

_ALPACA = "instruction input output system history"
_READS = {
    "messages": "messages tools system",
    "prompt_completion": "prompt completion tools system",
    "sharegpt": "conversations tools system",
    "alpaca": _ALPACA,
    "metamath": "query response system history",
    "evol_instruct_code": _ALPACA,
    "xlam": "query tools answers",
    "gsm8k": "question answer",
    "mbpp": "prompt solution entry_point is_solved",
    "seal_tools": "query calling",
    "react": "instruction output",
}
_CONTEXT = ("system", "history", "context", "functions", "tools")
_NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")


def unread_columns(record: Record, format_name: str) -> list[str]:
    """Columns of a row that hold something and that its format does not read.

    Raises:
        RowError: one of them is context of the answer.
    """
    reads = _READS[format_name].split()
    values = record.values
    unread = [key for key in values if key not in ("id", *reads) and not _is_empty(values[key])]
    for key in unread:
        if key in _CONTEXT:
            raise RowError(
                record.origin,
                f"the format {format_name} does not read {key!r}, which holds "
                f"{shorten(values[key])}",
                f"Name another format, rename it with the source's columns to one that is read "
                f"({', '.join(reads)}), or, to leave it out, to a name such as unused",
            )
    return unread


def _is_empty(value: Any) -> bool:
    return (value.strip() if isinstance(value, str) else value) in _NOTHING
