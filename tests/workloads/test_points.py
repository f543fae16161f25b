"""Load points: run once, kept whole, gone on with after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.fakes import FakeEngine, plan

from prefillshare_train.workloads import points
from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.driver import LoadResult
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import (
    Bench,
    DrawnWorkload,
    LoadPoint,
    PointStore,
    RecordedWorkload,
)

POINT = LoadPoint("bench", "react", "compute", "shared", 4, None, 2, sessions=3, warm_up=1)


def bench(
    folder: Path,
    engines: list[FakeEngine],
    make: Callable[[], FakeEngine] = FakeEngine,
    **options: Any,
) -> Bench:
    def client_of(point: LoadPoint) -> Any:
        engines.append(make())
        return in_process(engines[-1])

    setup = options.pop("setup", {"base": "b"})
    return Bench(
        lambda point: DrawnWorkload(plan()), client_of, PointStore(folder, setup), **options
    )


def test_each_point_has_a_fresh_engine_and_its_figures(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []
    results: dict[LoadPoint, LoadResult] = {}
    both = [POINT, replace(POINT, mode="isolated")]
    found = bench(tmp_path, engines, on_result=results.__setitem__).run(both)
    assert [(e.started, e.stopped) for e in engines] == [(1, 1), (1, 1)]
    # One warm-up session and three measured ones of six calls; only these are in the figures.
    assert [len(engine.requests) for engine in engines] == [24, 24]
    assert list(found) == both
    assert found[POINT]["requests"] == 18
    assert found[POINT]["errors"] == 0
    assert len(results[POINT].requests) == 18
    warm, measured = engines[0].requests[0].session, engines[0].requests[-1].session
    assert warm == "react-1000000"
    assert measured in {"react-0", "react-1", "react-2"}


def test_modes_and_rates_get_the_same_prompts(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []
    other = replace(POINT, mode="isolated", sessions_per_s=200.0, max_sessions=1)
    bench(tmp_path, engines).run([POINT, other])
    first, second = ({r.prompt_ids for r in engine.requests} for engine in engines)
    assert first == second


def test_finished_points_are_read_and_not_run(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []
    before = bench(tmp_path, engines).run([POINT])
    again = bench(tmp_path, engines).run([POINT, replace(POINT, repeat=1)])
    assert len(engines) == 2
    assert again[POINT] == before[POINT]


def test_other_settings_are_other_points(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []
    bench(tmp_path, engines).run([POINT])
    bench(tmp_path, engines, setup={"base": "other"}).run([POINT])
    bench(tmp_path, engines).run([replace(POINT, kv_bytes=1)])
    bench(tmp_path, engines, objectives=Objectives(ttft_s=9.0)).run([POINT])
    bench(tmp_path, engines, timeout_s=9.0).run([POINT])
    assert len(engines) == len(list(tmp_path.glob("*.json"))) == 5


def test_other_sessions_of_one_name_are_measured_anew(tmp_path: Path) -> None:
    """A trace may be written anew under its path."""
    engines: list[FakeEngine] = []
    one, other = (RecordedWorkload(plan(seed=seed).sessions(2)) for seed in (1, 2))
    for workload in (one, one, other):
        replace(bench(tmp_path, engines), workload_of=lambda _, w=workload: w).run([POINT])
    assert len(engines) == 2


@pytest.mark.parametrize("name", ["machine", "_code_fingerprint"])
def test_another_machine_or_engine_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engines: list[FakeEngine] = []
    bench(tmp_path, engines).run([POINT])
    monkeypatch.setattr(points, name, lambda *_: "another")
    bench(tmp_path, engines).run([POINT])
    assert len(engines) == 2


@pytest.mark.parametrize("part", ["core", "data", "serving", "workloads"])
def test_code_that_a_load_runs_through_is_part_of_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(points, "__file__", str(tmp_path / "workloads" / "points.py"))
    before = points._code_fingerprint()
    (tmp_path / part).mkdir()
    (tmp_path / part / "module.py").write_text("VALUE = 1\n")
    assert points._code_fingerprint() != before


def test_points_of_another_start_of_a_server_are_measured_anew_in_their_place(
    tmp_path: Path,
) -> None:
    engines: list[FakeEngine] = []
    for start, runs in (("first", 1), ("first", 1), ("second", 2), (None, 2), ("first", 3)):
        one = bench(tmp_path, engines)
        replace(one, store=PointStore(tmp_path, {"base": "b"}, server_start=start)).run([POINT])
        assert len(engines) == runs
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_machine_of_a_point_has_a_gpu_only_where_it_was_computed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"a GPU ({device})")
    devices = ("cpu", "cuda:1")
    names = {device: PointStore(tmp_path, {}, device=device).machine for device in devices}
    assert "GPU" not in names["cpu"]
    assert names["cuda:1"].endswith("a GPU (cuda:1)")
    engines: list[FakeEngine] = []
    for device in names:
        one = bench(tmp_path, engines)
        store = PointStore(tmp_path, {"base": "b"}, device=device)
        assert replace(one, store=store).run([POINT])[POINT]["machine"] == names[device]
    assert len(engines) == 2


def test_a_file_holds_the_point_and_every_record(tmp_path: Path) -> None:
    bench(tmp_path, []).run([POINT])
    [path] = tmp_path.glob("*.json")
    held = json.loads(path.read_text())
    assert held["point"]["mode"] == "shared"
    assert held["setup"]["base"] == "b"
    asked = {"objectives", "fixed_context", "timeout_s", "sessions"}
    assert set(held["setup"]) == {"base", "machine", "code", *asked}
    assert len(held["requests"]) == 18
    assert len(held["sessions"]) == 3
    assert held["figures"]["machine"]


def test_a_warm_up_that_fails_is_not_measured(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []
    with pytest.raises(WorkloadError, match="warm-up failed, the first with: it broke"):
        bench(tmp_path, engines, lambda: FakeEngine(fail="b")).run([POINT])
    assert not list(tmp_path.glob("*.json"))
    assert engines[0].stopped == 1


def test_errors_of_measured_sessions_are_counted(tmp_path: Path) -> None:
    point = replace(POINT, warm_up=0)
    found = bench(tmp_path, [], lambda: FakeEngine(fail="b")).run([point])
    assert found[point]["errors"] == 3
    assert found[point]["requests"] == 6
    assert found[point]["p95_s"] is None


def test_sessions_that_never_fit_are_refused_before_the_load(tmp_path: Path) -> None:
    engines: list[FakeEngine] = []

    def small() -> FakeEngine:
        engine = FakeEngine()
        engine.max_prompt_tokens = 20
        return engine

    with pytest.raises(WorkloadError, match=r"grows to .* tokens; the engine takes 20"):
        bench(tmp_path, engines, small).run([POINT])
    assert not engines[0].requests


def test_recorded_sessions_are_run_as_they_are(tmp_path: Path) -> None:
    sessions = plan("uniform", calls=2).sessions(2)
    workload = RecordedWorkload(sessions)
    assert workload.sessions(POINT) == sessions
    assert workload.warm_up(POINT) == []


def test_a_trace_has_a_rate_of_its_own() -> None:
    sessions = plan("uniform", calls=1).sessions(5)
    assert RecordedWorkload(sessions).sessions_per_s is None
    spread = [replace(session, at_s=3 + 0.5 * n) for n, session in enumerate(sessions)]
    assert RecordedWorkload(spread).sessions_per_s == 2.0


SLOW = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.workloads.fakes import FakeEngine
from tests.workloads.test_points import POINT, bench
engines = []
points = [replace(POINT, repeat=n) for n in range(4)]
bench(Path(sys.argv[1]), engines, lambda: FakeEngine(first_s=0.02)).run(points)
print(len(engines))
"""


def test_a_killed_run_goes_on_at_the_point_it_was_in(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = {
        "args": [sys.executable, "-c", SLOW, str(tmp_path)],
        "cwd": root,
        "env": {**os.environ, "PYTHONPATH": paths},
        "stderr": subprocess.DEVNULL,
    }
    process = subprocess.Popen(**options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("bench*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.read_bytes() for path in tmp_path.glob("bench*.json")}
    assert 1 <= len(done) < 4
    # What a kill in the middle of writing leaves is not taken for a finished point.
    (tmp_path / ".unfinished-bench-x.json").write_text("{")
    again = subprocess.run(**options, check=True, stdout=subprocess.PIPE, text=True)
    assert int(again.stdout) == 4 - len(done)
    assert all(path.read_bytes() == content for path, content in done.items())


def test_figures_name_the_dtype_beside_the_machine(tmp_path: Path) -> None:
    store = PointStore(tmp_path, {"dtype": "float32"})
    found = replace(bench(tmp_path, []), store=store).run([POINT])[POINT]
    assert found["machine"] == f"{store.machine}, float32"
