"""A grid from start to report, and what its loads are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.fakes import DECODERS, FakeEngine, plan

from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import DrawnWorkload, LoadPoint, PointStore
from prefillshare_train.workloads.run import Grid, regime_of, run_grid
from prefillshare_train.workloads.sessions import CUE_TOKENS, Session, Turn


def test_a_side_that_answers_nothing_is_reported(tmp_path: Path) -> None:
    def client_of(point: LoadPoint) -> Any:
        return in_process(FakeEngine(fail=DECODERS if point.mode == "isolated" else ()))

    grid = Grid("uniform", ("shared", "isolated"), (None,), (2,), 4, 3, 0, 1, 1)
    tables = run_grid(
        grid,
        DrawnWorkload(plan("uniform", calls=2)),
        client_of,
        tmp_path,
        PointStore(tmp_path / "points", {}),
        objectives=Objectives(),
    )
    shared, isolated = json.loads((tmp_path / "bench.json").read_text())
    assert (shared["errors"], isolated["errors"], isolated["throughput_tok_s"]) == (0, 3, 0.0)
    assert tables == (tmp_path / "bench.md").read_text()


def test_rows_are_kept_whatever_becomes_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefillshare_train.workloads.run.markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_grid(
            Grid("uniform", ("shared",), (None,), (2,), 4, 3, 0, 1, 1),
            DrawnWorkload(plan("uniform", calls=2)),
            lambda point: in_process(FakeEngine()),
            tmp_path,
            PointStore(tmp_path / "points", {}),
            objectives=Objectives(),
        )
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 1


def test_a_trace_of_loads_that_were_all_finished_is_refused(tmp_path: Path) -> None:
    def grid(record: Path | None, *caps: int) -> None:
        run_grid(
            Grid("uniform", ("shared",), (None,), caps, 4, 3, 0, 1, 1),
            DrawnWorkload(plan("uniform", calls=2)),
            lambda point: in_process(FakeEngine()),
            tmp_path,
            PointStore(tmp_path / "points", {}),
            objectives=Objectives(),
            record=record,
        )

    trace = tmp_path / "trace.jsonl"
    grid(None, 2)
    with pytest.raises(WorkloadError, match=r"trace.jsonl: .* all 1 were finished .* --out"):
        grid(trace, 2)
    assert not trace.exists()
    grid(trace, 2, 3)
    assert trace.is_file()


def test_memory_is_short_where_the_isolated_side_does_not_fit() -> None:
    decoders = {"decoders": ("a", "b"), "system_tokens": 8, "context_tokens": 20}
    sessions = plan("uniform", calls=2, response_tokens=6, **decoders).sessions(3)
    # Each decoder keeps the system prompt, and of each session its longest prompt's rest.
    first = 20 + CUE_TOKENS
    second = first + 6 + CUE_TOKENS
    # The last prompt token of a call is its decoder's own, and a response of each session runs.
    needed = 2 * 8 + 2 * (first - 1 + second - 1) + 2 * 6
    assert regime_of(sessions, 2, needed * 10, 10) == "compute"
    assert regime_of(sessions, 2, needed * 10 - 1, 10) == "memory"
    assert regime_of(sessions, 3, needed * 10, 10) == "memory"
    chat = Session("s", (Turn("a", (), 6, messages=({"role": "user", "content": "hi"},)),))
    assert regime_of([chat], 2, 1, 10) == "unknown"


def test_prompts_end_in_the_assistant_header() -> None:
    for kind in ("react", "reflexion", "uniform"):
        plain, headed = (
            plan(kind, header=header).sessions(2)[1].prompts() for header in ((), (91, 92))
        )
        assert all(prompt[-2:] == (91, 92) for prompt in headed)
        assert [tuple(t for t in prompt if t < 91) for prompt in headed] == plain
