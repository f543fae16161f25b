"""Traces: recorded, read back, replayed; faults name their line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.fakes import DECODERS, FakeEngine, plan

from prefillshare_train.workloads.client import InProcessClient
from prefillshare_train.workloads.driver import DriverOptions, LoadResult, drive
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.sessions import Session
from prefillshare_train.workloads.trace import read_trace, write_trace


def run(engine: FakeEngine, sessions: list[Session]) -> LoadResult:
    return asyncio.run(drive(InProcessClient(engine), sessions, DriverOptions(4)))


def test_a_recorded_load_is_replayed_request_by_request(tmp_path: Path) -> None:
    first, second = FakeEngine(first_s=0.002), FakeEngine()
    path = tmp_path / "trace.jsonl"
    write_trace(path, run(first, plan().sessions(3)))
    sessions = read_trace(path, DECODERS)
    run(second, sessions)
    for name in {session.name for session in sessions}:
        sides = [
            [
                (r.decoder, r.prompt_ids, r.sampling.max_tokens)
                for r in engine.requests
                if r.session == name
            ]
            for engine in (first, second)
        ]
        assert sides[0] == sides[1]
    assert len(second.requests) == 18


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"session": "s", "at_s": 4.0, "decoder": "a", "max_tokens": 3, "prompt_ids": [1, 2]}


def test_times_are_those_of_the_trace_over_its_speed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t",
        {**ROW, "at_s": 10.0},
        ROW,
        {**ROW, "session": "early", "at_s": 1.0},
    )
    early, session = read_trace(path, DECODERS, speed=2.0)
    assert (early.name, early.at_s) == ("early", 0.5)
    assert session.at_s == 2.0
    assert [turn.not_before_s for turn in session.turns] == [0.0, 3.0]


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    row = {key: value for key, value in ROW.items() if key != "prompt_ids"}
    [session] = read_trace(write(tmp_path / "t", {**row, "messages": messages}), DECODERS)
    assert session.turns[0].messages == tuple(messages)
    engine = FakeEngine()
    result = run(engine, [session])
    assert engine.requests[0].prompt_ids == (2,)
    with pytest.raises(WorkloadError, match="not recorded"):
        write_trace(tmp_path / "again", result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": 3}, "session is 3"),
        ({"at_s": -1}, "at_s is -1"),
        ({"at_s": True}, "at_s is True"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt_ids": []}, r"prompt_ids is \[\]"),
        ({"prompt_ids": ["a"]}, "prompt_ids is"),
        ({"messages": [{"role": "user"}]}, "either prompt_ids or messages"),
        ({"decoder": "zzz"}, "decoder 'zzz' is not served; served are a, b, c, d"),
    ],
)
def test_faults_name_their_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "trace.jsonl", ROW, {**ROW, **change})
    with pytest.raises(WorkloadError, match=message) as caught:
        read_trace(path, DECODERS)
    assert "trace.jsonl, line 2" in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("not json\n")
    with pytest.raises(WorkloadError, match="line 1 is not JSON"):
        read_trace(path, DECODERS)
    path.write_text("[1]\n")
    with pytest.raises(WorkloadError, match="expected an object, found list"):
        read_trace(path, DECODERS)
    path.write_text("\n")
    with pytest.raises(WorkloadError, match="holds no requests"):
        read_trace(path, DECODERS)
    with pytest.raises(WorkloadError, match="no such trace"):
        read_trace(tmp_path / "absent", DECODERS)
    with pytest.raises(WorkloadError, match="speed must be above 0"):
        read_trace(path, DECODERS, speed=0)
