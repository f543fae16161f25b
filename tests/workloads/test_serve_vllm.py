"""`benchmarks/serve_vllm.py` on a stand-in for its servers: what is run, kept and compared."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import PointStore
from prefillshare_train.workloads.sessions import SessionPlan

REPOSITORY = Path(__file__).resolve().parents[2]


class StandIn:
    """Answers as vLLM does: a chunk a token, the usage at the end, counters on /metrics."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.asked: list[tuple[str, int]] = []
        self.app = FastAPI()
        self.app.post("/v1/completions")(self.complete)
        self.app.get("/metrics")(self.metrics)

    async def complete(self, request: Request) -> StreamingResponse:
        body = await request.json()
        tokens, count = len(body["prompt"]), body["max_tokens"]
        self.asked.append((body["model"], tokens))
        details = {"cached_tokens": tokens // 2}
        usage = {"prompt_tokens": tokens, "completion_tokens": count}
        chunks = [{"choices": [{"text": "a"}]} for _ in range(count)]
        chunks.append({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    async def metrics(self) -> PlainTextResponse:
        total = sum(tokens for _, tokens in self.asked)
        name = "vllm:prompt_tokens"
        return PlainTextResponse(f"# TYPE {name} counter\n{name}_total {total}.0\n")

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        # A busy machine may leave a connection idle for longer than the usual 5 s.
        config = uvicorn.Config(self.app, port=0, log_level="error", timeout_keep_alive=60)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_each_point_is_run_once_and_the_best_caps_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    bench, loads_of, systems = (
        importlib.import_module(name) for name in ("serve_vllm", "vllm_loads", "vllm_systems")
    )
    monkeypatch.setattr(loads_of, "COUNTERS_S", 0.0)
    stand_in = StandIn()
    with stand_in.serving() as url:

        @contextlib.contextmanager
        def running(system: str) -> Iterator[Any]:
            stand_in.started.append(system)
            yield systems.Running(url, None if system == "reference" else url)

        servers: Any = SimpleNamespace(running=running, block_tokens=4)
        plan = SessionPlan("react", ("a", "b"), tuple(range(50)), system_tokens=16)
        store = PointStore(tmp_path / "points", {})
        loads = loads_of.Loads(servers, plan, store, Objectives())
        options = argparse.Namespace(
            **{"workload": "react", "sessions": 2, "warm_up": 1, "kv_gib": 1, "caps": [1, 2]},
            **{"systems": systems.SYSTEMS, "repeats": 2},
        )
        rows, rates = bench.measure_sessions(loads, options)
        # Two caps of each, each one's best again, and vLLM's rates at the caps of both vLLMs.
        assert stand_in.started[:9] == [*systems.SYSTEMS] * 3
        assert stand_in.started[9:] == ["stock"] * len(rates)
        assert ("base", 512) in stand_in.asked
        assert ("a", 1025) in stand_in.asked
        assert bench.measure_sessions(loads, options) == (rows, rates)
        assert len(stand_in.started) == 9 + len(rates)

    by_system = {system: [r for r in rows if r["system"] == system] for system in systems.SYSTEMS}
    assert all(sorted(r["repeats"] for r in found) == [1, 2] for found in by_system.values())
    assert all(row["errors"] == 0 and row["hit_ratio"] == pytest.approx(0.5, 0.1) for row in rows)
    sessions = plan.sessions(2)
    sent = sum(len(prompt) for session in sessions for prompt in session.prompts())
    assert [row["run_prompt_tokens"] for row in by_system["shared"]] == [sent, sent]
    assert "run_prompt_tokens" not in by_system["reference"][0]

    result = {"setup": {"machine": "m"}, "note": "n", "loads": rows, "rates": rates, "client": []}
    text = bench.report(result, tmp_path)
    written = json.loads((tmp_path / "vllm.json").read_text())
    assert written["comparison"]["bound_share"] > 0
    assert (tmp_path / "vllm.md").read_text() == text
