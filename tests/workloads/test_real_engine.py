"""Sessions against the real engine, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.conftest import NAMES
from tests.workloads.fakes import plan

from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.points import Bench, DrawnWorkload, LoadPoint, PointStore
from prefillshare_train.workloads.report import rows_of
from prefillshare_train.workloads.vocabulary import ordinary_token_ids

POINT = LoadPoint(
    "bench", "react", "compute", "shared", 3, None, 1, sessions=3, warm_up=1, kv_bytes=1 << 22
)


@pytest.fixture(scope="module")
def models(served: Path) -> ServedModels:
    return ServedModels.load(str(served / "base"), {name: served / name for name in NAMES})


def bench(models: ServedModels, folder: Path, kind: str = "react", **options: Any) -> Bench:
    vocabulary = ordinary_token_ids(models.renderer.tokenizer)
    drawn = plan(kind, decoders=NAMES, vocabulary=vocabulary, system_tokens=13)

    def client_of(point: LoadPoint) -> Any:
        config = EngineConfig(
            mode=point.mode,
            kv_bytes=point.kv_bytes,
            block_tokens=4,
            session_tokens=point.session_tokens,
            staging_bytes=point.staging_bytes,
        )
        return in_process(Engine(models, config))

    return Bench(lambda point: DrawnWorkload(drawn), client_of, PointStore(folder, {}), **options)


@pytest.mark.parametrize("kind", ["react", "reflexion"])
def test_hits_are_the_workloads_own_limit_where_memory_suffices(
    models: ServedModels, tmp_path: Path, kind: str
) -> None:
    points = [POINT, replace(POINT, mode="isolated")]
    shared, isolated = rows_of(bench(models, tmp_path, kind).run(points))
    assert shared["errors"] == isolated["errors"] == 0
    assert shared["hit_ratio"] == pytest.approx(shared["hit_ratio_max"])
    assert isolated["hit_ratio"] == pytest.approx(isolated["hit_ratio_max"])
    assert shared["hit_ratio"] > isolated["hit_ratio"] + 0.05
    assert shared["peak_kv_bytes"] < isolated["peak_kv_bytes"]
    assert shared["bound"] == isolated["bound"] > 1
    assert shared["prefill_s_per_token"] > 0


def test_concurrent_sessions_lose_no_hits(models: ServedModels, tmp_path: Path) -> None:
    [row] = rows_of(bench(models, tmp_path).run([replace(POINT, max_sessions=3)]))
    assert row["hit_ratio"] == pytest.approx(row["hit_ratio_max"], abs=0.02)


def test_generated_contexts_have_the_same_lengths(models: ServedModels, tmp_path: Path) -> None:
    results: list[Any] = []
    for fixed in (True, False):
        run = bench(
            models,
            tmp_path / str(fixed),
            fixed_context=fixed,
            on_result=lambda point, result: results.append(result),
        )
        run.run([POINT])
    scripted, generated = results
    assert [len(s.prompt_ids) for s in scripted.sent] == [len(s.prompt_ids) for s in generated.sent]
    assert [s.prompt_ids for s in scripted.sent] != [s.prompt_ids for s in generated.sent]


def test_too_little_memory_lowers_hits_and_the_host_tier_is_counted(
    models: ServedModels, tmp_path: Path
) -> None:
    tight = replace(POINT, max_sessions=3, mode="isolated", kv_bytes=40 * 4 * 256)
    points = [tight, replace(tight, staging_bytes=1 << 20)]
    plain, staged = rows_of(bench(models, tmp_path).run(points))
    assert plain["errors"] == staged["errors"] == 0
    assert plain["hit_ratio"] < plain["hit_ratio_max"] - 0.02
    assert plain["staged_bytes"] == 0 < staged["staged_bytes"]
    assert staged["hit_ratio"] > plain["hit_ratio"]
