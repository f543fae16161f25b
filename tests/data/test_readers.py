"""Files, directories and the hub; errors name the file and the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.helpers import pairs, write_jsonl

from prefillshare_train.data import DataError, RowError, SourceConfig
from prefillshare_train.data.readers import read_file, read_records, require_path, resolve_path
from prefillshare_train.data.rows import Record


def values(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [item.values for item in records(path, **options)]


def records(path: Path | str, base_dir: Path = Path("."), **options: Any) -> list[Record]:
    found = list(read_records(SourceConfig(source=str(path), **options), base_dir))
    assert all(isinstance(item, Record) for item in found), found
    return [item for item in found if isinstance(item, Record)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n'),
        ("a.jsonl", '\ufeff{"a": 1}\r\n{"a": 2}'),
        ("a.json", '[{"a": 1},\n {"a": 2}]'),
        ("a.json", '{"a": 1}\n{"a": 2}\n'),
        ("a.json", '{"data": [{"a": 1}, {"a": 2}]}'),
        ("A.JSONL", '{"a": 1}\n{"a": 2}\n'),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_json_in_every_shape(tmp_path: Path, name: str, text: str, zipped: bool) -> None:
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert values(path) == [{"a": 1}, {"a": 2}]
    assert [record.index for record in records(path)] == [0, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"prompt": "p", "completion": "c"},
    ],
)
def test_document_that_is_one_row(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row))
    assert values(path) == [row]


def test_line_separators_inside_strings_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y\u0085z"}\n', encoding="utf-8")
    assert values(path) == [{"a": "x\u2028y\u0085z"}]


def test_origin_names_the_line_of_jsonl_and_the_row_of_json(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    rows.write_text('[{"a": 1}, {"a": 2}]')
    assert records(lines)[1].origin == f"{lines}:3"
    assert records(rows)[1].origin == f"{rows}:row 2"


@pytest.mark.parametrize("bad", ['{"a": }', "3", '{"a": 1', f'{{"a": {"9" * 5000}}}'])
def test_bad_line_comes_as_its_error_and_the_rest_is_read(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 3}}\n')
    first, error, third = read_file(path)
    assert isinstance(error, RowError)
    assert error.origin == f"{path}:2"
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    assert (first.index, third.index) == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a": }]', r"a.json:2: not valid JSON \(Expecting value, column 7\)"),
        (b'[{"a": 1},\n{"a": "\xff"}]', r"a.json:2: not valid UTF-8"),
        (b"3", r"a.json: holds 3. Give a list"),
        (b"[" + b"9" * 5000 + b"]", r"a.json: not valid JSON"),
        (b"[" * 100_000, r"a.json: not valid JSON"),
        (b"", r"a.json:1: not valid JSON"),
    ],
    ids=["syntax", "encoding", "number", "huge number", "deep", "empty"],
)
def test_bad_json_document_names_file_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_file(path))


def test_damaged_gzip_names_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", pairs(200))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[40:60] = bytes(20)
    for content in (b"no gzip", whole[:-20], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
            list(read_file(path))


def test_parquet_loses_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"id": 1, "m": [{"k": {"x": 1}}]}, {"id": None, "m": [{"k": {"y": "b"}}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == rows
    assert records(path)[1].origin == f"{path}:row 2"


def test_broken_parquet_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 is not enough PAR1")
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file"):
        list(read_file(path))


def test_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b")
    with pytest.raises(DataError, match=r"a.csv: unknown kind of file. Use one of .jsonl"):
        list(read_records(SourceConfig(source=str(path)), Path()))


def test_directory_reads_its_train_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00001.jsonl", [{"a": 2}])
    write_jsonl(tmp_path / "train-00000.jsonl.gz", [{"a": 1}])
    write_jsonl(tmp_path / "test.jsonl", [{"a": 3}])
    write_jsonl(tmp_path / "trainer.jsonl", [{"a": 4}])
    (tmp_path / "README.md").write_text("text")
    assert values(tmp_path) == [{"a": 1}, {"a": 2}]
    assert [record.index for record in records(tmp_path)] == [0, 1]
    assert values(tmp_path, split="test") == [{"a": 3}]
    with pytest.raises(DataError, match=r"no file of split 'dev'; found test.jsonl, train-00000"):
        records(tmp_path, split="dev")


def test_directory_without_splits_is_read_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "values.jsonl", [{"a": 2}])
    write_jsonl(tmp_path / "first.json", [{"a": 1}])
    assert values(tmp_path) == [{"a": 1}, {"a": 2}]


def test_directory_with_other_splits_asks_which(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dev.jsonl", [{"a": 1}])
    write_jsonl(tmp_path / "tool.jsonl", [{"a": 2}])
    with pytest.raises(DataError, match="several splits and none named train"):
        records(tmp_path)
    assert values(tmp_path, split="dev", tools_file="x/tool.jsonl") == [{"a": 1}]


def test_pool_of_tools_beside_the_rows_is_not_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    write_jsonl(tmp_path / "tool.jsonl", [{"a": 2}])
    assert values(tmp_path, tools_file="x/tool.jsonl") == [{"a": 1}]


def test_empty_directory_and_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .jsonl, .*file in it"):
        records(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="is one file, which has no split 'test'"):
        records(path, split="test")


def test_saved_data_sets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"a": {"x": 1}}, {"a": {"y": 2}}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == [{"a": {"x": 1}}, {"a": {"y": 2}}]
    assert values(tmp_path / "two", split="dev") == [{"a": {"y": 2}}]
    assert len(values(tmp_path / "two")) == 2
    with pytest.raises(DataError, match="no split 'test'; found train, dev"):
        records(tmp_path / "two", split="test")
    with pytest.raises(DataError, match="has no splits"):
        records(tmp_path / "one", split="train")


def test_hub_id_is_loaded_with_all_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = records("someone/rows", subset="main", revision="abc", split="dev")
    assert asked == [("someone/rows", {"name": "main", "split": "dev", "revision": "abc"})]
    assert (record.values, record.origin) == ({"a": 1}, "someone/rows[dev]:row 1")


def test_failed_hub_load_says_that_no_path_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"someone/rows is no local path.*ConnectionError: offline"):
        records("someone/rows")


def test_relative_paths_from_here_first_then_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    here.mkdir()
    write_jsonl(recipe / "a.jsonl", [{"a": "recipe"}])
    monkeypatch.chdir(here)
    assert records("a.jsonl", recipe)[0].values == {"a": "recipe"}
    write_jsonl(here / "a.jsonl", [{"a": "here"}])
    assert records("a.jsonl", recipe)[0].values == {"a": "here"}
    assert resolve_path("b.jsonl", recipe) is None


def test_missing_path_names_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("no/such/file.jsonl", "./missing", "../missing", "a/b/c"):
        with pytest.raises(DataError, match="was not found, neither from the current") as error:
            records(source, tmp_path / "recipe")
        assert str(tmp_path / "recipe") in str(error.value)
    with pytest.raises(DataError, match=r"^tools_file: x.jsonl was not found"):
        require_path("x.jsonl", tmp_path, "tools_file")
