"""`prefillshare bench --url`: what a server keeps from one load must not flatter the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.data.helpers import tiny_tokenizer
from tests.serving.served import save_served
from tests.serving.server.serving import Served, serve
from typer.testing import CliRunner

from prefillshare_train.cli.bench_targets import http_server
from prefillshare_train.cli.main import app
from prefillshare_train.data import make_renderer
from prefillshare_train.data.generation_header import plain_header
from prefillshare_train.serving.api import EventSink, GenerationRequest
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.errors import WorkloadError

NAMES = ("math", "tools")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tools` runs its assistant header itself, `math` the last token."""
    return save_served(tmp_path_factory.mktemp("served"), NAMES)


@contextmanager
def server_of(folder: Path) -> Iterator[Served]:
    models = ServedModels.load(str(folder / "base"), {name: folder / name for name in NAMES})
    config = EngineConfig(kv_bytes=1 << 24, block_tokens=4)
    with Engine(models, config) as engine, serve(engine) as running:
        yield running


def bench(folder: Path, out: Path, *options: str) -> Any:
    sizes = ["--workload=uniform", "--calls=4", "--response-tokens=6", "--system-tokens=8"]
    sizes += ["--sessions=2", "--warm-up=1"]
    return CliRunner().invoke(
        app, ["bench", f"--base={folder / 'base'}", f"--out={out}", *sizes, *options]
    )


def over_http(folder: Path, running: Served, out: Path, *options: str) -> Any:
    names = [f"--decoder={name}" for name in NAMES]
    return bench(folder, out, f"--url=http://127.0.0.1:{running.port}", *names, *options)


def points(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "points").glob("*.json"))]


def test_no_load_finds_the_cache_of_another(folder: Path, tmp_path: Path) -> None:
    with server_of(folder) as running:
        for run in ("first", "second"):
            result = over_http(folder, running, tmp_path / run, "--max-sessions=1,2", "--repeats=2")
            assert result.exit_code == 0, result.output
            measured = points(tmp_path / run)
            assert len(measured) == 4
            for point in measured:
                found = point["figures"]
                assert found["errors"] == 0
                assert 0.3 < found["hit_ratio"] <= found["hit_ratio_max_by_mode"]["shared"]
                assert point["point"]["regime"] == "unknown"


def test_the_boundary_is_the_decoders_own_in_process_and_over_http(
    folder: Path, tmp_path: Path
) -> None:
    decoders = [f"--decoder={name}={folder / name}" for name in NAMES]
    result = bench(folder, tmp_path / "here", "--mode=shared", "--kv-gib=0.05", *decoders)
    assert result.exit_code == 0, result.output
    [here] = points(tmp_path / "here")
    with server_of(folder) as running:
        result = over_http(folder, running, tmp_path / "there")
        assert result.exit_code == 0, result.output
    [there] = points(tmp_path / "there")
    assert here["figures"]["errors"] == there["figures"]["errors"] == 0
    own = {r["decoder"]: r["prompt_tokens"] - r["base_tokens"] for r in here["requests"]}
    header = plain_header(make_renderer(tiny_tokenizer()))
    assert own == {"math": 1, "tools": len(header)}
    sent = [
        sorted((r["session"], r["turn"], r["prompt_tokens"]) for r in run["requests"])
        for run in (here, there)
    ]
    assert sent[0] == sent[1]


def test_without_extensions_one_load_is_measured_and_nothing_unknown_is_sent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GenerationRequest] = []
    submit = Engine.submit

    def watched(self: Engine, request: GenerationRequest, sink: EventSink) -> None:
        seen.append(request)
        submit(self, request, sink)

    monkeypatch.setattr(Engine, "submit", watched)
    with server_of(folder) as running:
        refused = over_http(folder, running, tmp_path, "--no-extensions", "--max-sessions=1,2")
        assert refused.exit_code == 2
        assert "--no-extensions sends no cache_salt, so that of 2 loads" in refused.output
        assert not seen
        result = over_http(folder, running, tmp_path, "--no-extensions", "--max-sessions=1")
        assert result.exit_code == 0, result.output
    assert seen
    for request in seen:
        assert request.session is request.cache_salt is None
        assert not request.sampling.ignore_eos


def test_finished_loads_are_those_of_one_start_of_the_server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(created: int, owner: str) -> None:
        models = {"data": [{"id": "a", "created": created, "owned_by": owner}]}
        monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, json=models))

    def runs(*options: str) -> int:
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "points").glob("*")}
        result = over_http(folder, running, tmp_path, *options)
        assert result.exit_code == 0, result.output
        paths = (tmp_path / "points").glob("*")
        return sum(before.get(path) != path.stat().st_mtime_ns for path in paths)

    with server_of(folder) as running:
        told(5, "prefillshare")
        assert [runs(), runs()] == [1, 0]
        told(6, "prefillshare")
        assert [runs(), runs()] == [1, 0]
        # Others tell a constant, or the time of the question.
        told(6, "another")
        assert [runs(), runs(), runs("--resume")] == [1, 1, 0]


def test_a_server_that_is_not_there_is_named() -> None:
    given: Any = ("http://127.0.0.1:1", "chat", None, None, 1.0)
    with pytest.raises(WorkloadError, match=r"--url http://127\.0\.0\.1:1: nobody answers"):
        http_server(*given, extensions=True, resume=False)
