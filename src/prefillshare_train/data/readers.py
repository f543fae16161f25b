"""Raw records from files, directories and the hub, each with where it lies.

JSON is read with the standard library and not through `datasets`, so that an error can name the
line, and because Arrow's tables fill absent keys of nested objects with nulls.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefillshare_train.data.config import SourceConfig
from prefillshare_train.data.errors import DataError, RowError, shorten
from prefillshare_train.data.rows import Record

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SPLIT_NAMES = ("train", "dev", "valid", "validation", "val", "test", "eval", "evaluation")
# A document of one such key is a row; one of any other key with a list wraps the rows.
_LIST_COLUMNS = ("messages", "conversations")
_Decode = json.JSONDecodeError
_CORRECT = "Correct or remove the row"


def resolve_path(text: str, base_dir: Path) -> Path | None:
    """The file or directory that a recipe means by `text`, or None where there is none.

    A relative path is looked up from the current directory first, then from `base_dir`.
    """
    path = Path(text).expanduser()
    for candidate in (path, base_dir / path):
        if candidate.exists():
            return candidate
    return None


def unlike_hub_id(text: str, base_dir: Path) -> str:
    """`text`, with `./` before it where it names a place here and could be a hub id elsewhere."""
    could_be = _HUB_ID.fullmatch(text) and not text.lower().endswith(SUFFIXES)
    return f"./{text}" if could_be and resolve_path(text, base_dir) is not None else text


def require_path(text: str, base_dir: Path, key: str) -> Path:
    """As `resolve_path`.

    Raises:
        DataError: there is none; names `key` and both places.
    """
    path = resolve_path(text, base_dir)
    if path is None:
        raise DataError(
            f"{key}: {text} was not found, neither from the current directory {Path.cwd()} nor "
            f"from {base_dir.resolve()}. Correct the path"
        )
    return path


def read_records(source: SourceConfig, base_dir: Path) -> Iterator[Record | RowError]:
    """Every record of a source in order; a line that cannot be read comes as its error.

    Raises:
        DataError: the source as a whole cannot be read.
    """
    path = resolve_path(source.source, base_dir)
    if path is None:
        if source.source.lower().endswith(SUFFIXES) or not _HUB_ID.fullmatch(source.source):
            require_path(source.source, base_dir, "source")
        yield from _hub(source)
    elif path.is_dir():
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            yield from _saved(path, source.split)
        else:
            index = 0
            for file in _files(path, source):
                for record in read_file(file, index):
                    yield record
                    index += 1
    elif source.split is not None:
        raise DataError(
            f"source: {source.source} is one file, which has no split {source.split!r}. "
            "Remove split, or name the directory"
        )
    else:
        yield from read_file(path)


def read_file(path: Path, first_index: int = 0) -> Iterator[Record | RowError]:
    """Records of one JSON, JSONL or Parquet file (see `read_records`)."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file. Use one of {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return _parquet(path, first_index)
    text = _text(path)
    if name.endswith((".json", ".json.gz")):
        whole = _whole_json(path, text)
        if whole is not None:
            return _items(path, whole, first_index)
    return _lines(path, text, first_index)


def _files(directory: Path, source: SourceConfig) -> list[Path]:
    # A pool of tools often lies beside the rows that call them.
    pool = Path(source.tools_file).name if source.tools_file else None
    files = sorted(
        file
        for file in directory.iterdir()
        if file.is_file() and file.name.lower().endswith(SUFFIXES) and file.name != pool
    )
    names = ", ".join(file.name for file in files)
    if not files:
        raise DataError(f"{directory}: no {', '.join(SUFFIXES)} file in it. Name another source")
    split = source.split or "train"
    chosen = [file for file in files if _is_split(file, split)]
    if chosen:
        return chosen
    if source.split is not None:
        raise DataError(
            f"{directory}: no file of split {split!r}; found {names}. Name another split"
        )
    if any(_is_split(file, name) for file in files for name in _SPLIT_NAMES):
        raise DataError(
            f"{directory}: several splits and none named train; found {names}. Set split, or name "
            "one file as the source"
        )
    return files


def _is_split(file: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![a-z0-9])", file.name, re.IGNORECASE) is not None


def _text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Correct the file or the path"
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not valid UTF-8 ({error.reason} at byte {error.start}). "
            "Convert the file to UTF-8"
        ) from None


def _whole_json(path: Path, text: str) -> list[Any] | None:
    """Rows of a JSON document, or None where the file holds one object a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first_line = text.lstrip().partition("\n")[0]
        try:
            if isinstance(json.loads(first_line), dict):
                return None
        except json.JSONDecodeError:
            pass
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}). "
            "Correct the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Correct the file") from None
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        wrapped = [key for key in value if key not in _LIST_COLUMNS and len(value) == 1]
        rows = value[wrapped[0]] if wrapped else None
        return rows if isinstance(rows, list) else [value]
    raise DataError(f"{path}: holds {shorten(value)}. Give a list of objects")


def _items(path: Path, values: list[Any], first: int) -> Iterator[Record | RowError]:
    for number, value in enumerate(values):
        yield _record(value, f"{path}:row {number + 1}", first + number)


def _lines(path: Path, text: str, first: int) -> Iterator[Record | RowError]:
    index = first
    # Not splitlines(), which also breaks at characters that JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            yield _record(json.loads(line), origin, index)
        except (ValueError, RecursionError) as error:
            # A decode error's own text names line 1, since it has seen this line only.
            at = f"{error.msg}, column {error.colno}" if isinstance(error, _Decode) else error
            yield RowError(origin, f"not valid JSON ({at}): {shorten(line)}", _CORRECT)
        index += 1


def _record(value: Any, origin: str, index: int) -> Record | RowError:
    if not isinstance(value, dict):
        return RowError(origin, f"not a JSON object but {shorten(value)}", _CORRECT)
    return Record(value, origin, index)


def _parquet(path: Path, first: int) -> Iterator[Record | RowError]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Record(_without_nulls(values), f"{path}:row {index + 1}", first + index)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _saved(path: Path, split: str | None) -> Iterator[Record | RowError]:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(path)
    if isinstance(dataset, DatasetDict):
        name = split or "train"
        if name not in dataset:
            raise DataError(f"{path}: no split {name!r}; found {', '.join(dataset)}. Set split")
        dataset = dataset[name]
    elif split is not None:
        raise DataError(f"{path}: has no splits, but split is {split!r}. Remove split")
    yield from _dataset(dataset, str(path))


def _hub(source: SourceConfig) -> Iterator[Record | RowError]:
    from datasets import load_dataset

    split = source.split or "train"
    try:
        dataset = load_dataset(
            source.source, name=source.subset, split=split, revision=source.revision
        )
    except Exception as error:  # datasets raises errors of many libraries here
        raise DataError(
            f"source: {source.source} is no local path, and loading it from the hub failed "
            f"({type(error).__name__}: {error}). Correct the path or id, split ({split}), subset "
            "or revision"
        ) from error
    yield from _dataset(dataset, f"{source.source}[{split}]")


def _dataset(dataset: Any, name: str) -> Iterator[Record | RowError]:
    for index, values in enumerate(dataset):
        yield Record(_without_nulls(values), f"{name}:row {index + 1}", index)


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls with which Arrow fills keys of nested objects.

    A null that was meant is lost with them; such values belong into a JSON string.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return value

    return {key: clean(value) for key, value in values.items()}
