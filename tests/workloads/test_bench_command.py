"""`prefillshare bench` from its flags to its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.serving.server.serving import serve
from tests.workloads.conftest import NAMES
from typer.testing import CliRunner, Result

from prefillshare_train.cli.main import app
from prefillshare_train.core.contract import Contract
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.report import KEYS
from prefillshare_train.workloads.run import Grid, numbers

DRAWN = ("--sessions=2", "--warm-up=1")


def invoke(served: Path, out: Path, *options: str) -> Result:
    decoders = [f"--decoder={name}={served / name}" for name in NAMES]
    sizes = ["--system-tokens=6", "--kv-gib=0.05", "--max-sessions=2"]
    return CliRunner().invoke(
        app, ["bench", f"--base={served / 'base'}", *decoders, *sizes, f"--out={out}", *options]
    )


def bench(served: Path, out: Path, *options: str) -> str:
    result = invoke(served, out, *options)
    assert result.exit_code == 0, result.output
    return result.output


def test_both_modes_are_measured_reported_and_recorded(served: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    options = (*DRAWN, "--workload=uniform", "--calls=4", "--rate=all,50")
    output = bench(served, tmp_path / "out", *options, f"--record={trace}")
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(row["mode"], row["sessions_per_s"]) for row in rows] == [
        ("shared", None),
        ("isolated", None),
        ("shared", 50.0),
        ("isolated", 50.0),
    ]
    assert all(tuple(row)[: len(KEYS)] == KEYS for row in rows)
    assert all(row["errors"] == 0 and row["hit_ratio"] > 0 for row in rows)
    assert "| uniform | compute | shared | 3 | all at once | 2 |" in output
    assert (tmp_path / "out" / "bench.md").read_text() in output
    points = list((tmp_path / "out" / "points").glob("*.json"))
    assert len(points) == 4
    times = {path: path.stat().st_mtime_ns for path in points}
    bench(served, tmp_path / "out", *options)
    assert {path: path.stat().st_mtime_ns for path in points} == times
    # The trace is a workload of its own.
    again = bench(served, tmp_path / "replay", f"--workload={trace}", "--mode=shared")
    assert "| trace | compute | shared | 3 |" in again


def test_a_trace_is_replayed_as_its_own_load(served: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"session": f"s{n}", "at_s": 0.1 * n, "decoder": "math", "max_tokens": 2, "prompt_ids": [n]}
        for n in range(10, 13)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"--workload={trace}", "--mode=shared")
    bench(served, tmp_path / "out", *options)
    [row] = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (row["sessions"], row["warm_up"], row["requests"]) == (3, 0, 3)
    assert row["sessions_per_s"] == pytest.approx(10)
    for given in ("--rate=all", "--sessions=3", "--warm-up=0"):
        result = invoke(served, tmp_path / "out", *options, given)
        assert result.exit_code == 2
        assert f"{given.partition('=')[0]}: a trace has its own sessions" in result.output


def test_decoders_that_changed_in_their_folders_are_measured_anew(
    served: Path, tmp_path: Path
) -> None:
    models = shutil.copytree(served, tmp_path / "models")

    def points() -> int:
        options = (*DRAWN, "--workload=uniform", "--calls=1", "--mode=shared")
        bench(models, tmp_path / "out", *options)
        return len(list((tmp_path / "out" / "points").glob("*.json")))

    assert points() == points() == 1
    replace(Contract.load(models / "math"), boundary="ratio:0.5").save(models / "math")
    assert points() == 2
    for name in ("code/adapter_model", "full/model"):
        weights = models / f"{name}.safetensors"
        scaled = {key: 1.5 * tensor for key, tensor in load_file(weights).items()}
        save_file(scaled, weights, metadata={"format": "pt"})
    assert points() == points() == 3


def test_a_load_tells_what_limits_it_and_where_it_was_computed(
    served: Path, tmp_path: Path
) -> None:
    sizes = ("--calls=2", "--context-tokens=100", "--kv-gib=0.00006")
    bench(served, tmp_path, *DRAWN, "--workload=uniform", "--mode=shared", *sizes)
    [row] = json.loads((tmp_path / "bench.json").read_text())
    assert row["regime"] == "memory"
    [held] = [json.loads(path.read_text()) for path in (tmp_path / "points").glob("*.json")]
    assert held["setup"]["device"] == "cpu"


def test_a_server_is_measured_over_http(served: Path, tmp_path: Path) -> None:
    models = ServedModels.load(str(served / "base"), {name: served / name for name in NAMES})
    config = EngineConfig(kv_bytes=1 << 24, block_tokens=4)
    names = [f"--decoder={name}" for name in NAMES]
    rows = {}
    with Engine(models, config) as engine, serve(engine) as running:
        for api in ("completions", "chat"):
            out = tmp_path / api
            options = [
                *("bench", f"--base={served / 'base'}", f"--url=http://127.0.0.1:{running.port}"),
                *(f"--api={api}", "--workload=uniform", "--calls=4", "--response-tokens=6"),
                *("--system-tokens=8", "--sessions=2", "--warm-up=1", f"--out={out}"),
            ]
            result = CliRunner().invoke(app, [*options, *names])
            assert result.exit_code == 0, result.output
            [rows[api]] = json.loads((out / "bench.json").read_text())
    for row in rows.values():
        assert (row["mode"], row["errors"], row["requests"]) == ("shared", 0, 8)
        assert row["throughput_tok_s"] * row["duration_s"] == pytest.approx(8 * 6)
        assert row["hit_ratio"] > 0.3
        assert row["ttft_p95_s"] > 0
        assert row["bound"] is row["peak_kv_bytes"] is None
    plain = rows["completions"]
    assert plain["hit_ratio"] == pytest.approx(plain["hit_ratio_max"], abs=0.05)


def test_faults_are_told_in_a_line(served: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", f"--base={served / 'base'}", "--decoder=nowhere", f"--out={tmp_path}"]
    )
    assert result.exit_code == 2
    assert "--decoder nowhere: give name=folder" in result.output


def test_grid_alternates_modes_innermost() -> None:
    grid = Grid("react", ("shared", "isolated"), (None, 1.0), (2, 4), 4, 8, 1, 2, 1)
    points = grid.points()
    assert len(points) == len(set(points)) == 16
    assert [p.mode for p in points[:4]] == ["shared", "isolated"] * 2
    assert [p.repeat for p in points] == [0] * 8 + [1] * 8


def test_numbers_are_read_with_commas() -> None:
    assert numbers("1, 2,4", "--x") == [1, 2, 4]
    assert numbers("all,0.5", "--x", float, words={"all": None}) == [None, 0.5]
    for text in ("0", "a", "-1", "inf", ""):
        with pytest.raises(WorkloadError, match="--x"):
            numbers(text, "--x", float, words={"all": None})
