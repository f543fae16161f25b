"""Loads on the servers of `vllm_systems`: agent sessions, vLLM's rates, and vLLM's own client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from vllm_figures import Rates, block_work, counts_of, difference
from vllm_systems import Running, Servers, System

from prefillshare_train.engines.vllm.topology import BASE_NAME
from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.client import Call
from prefillshare_train.workloads.driver import DriverOptions, LoadResult, drive
from prefillshare_train.workloads.http_client import HttpClient
from prefillshare_train.workloads.metrics import Figures, Objectives, figures
from prefillshare_train.workloads.points import DrawnWorkload, LoadPoint, PointStore
from prefillshare_train.workloads.sessions import SessionPlan

MODES: dict[System, Mode] = {"shared": "shared", "stock": "isolated", "reference": "shared"}
# Prompts that rates are measured with: whole blocks of any size that vLLM takes on CPUs, and a
# token that is then left to run.
_PREFILL_TOKENS, _CONTEXT_TOKENS, _RESPONSE_TOKENS = 512, 1024, 64
_LEAST_PREFILLS = 8
_CLIENT_S = 600
# vLLM tells its counters after a step, that is after the last response.
COUNTERS_S = 1.0
_PERCENTILES = "50,95,99"


@dataclass(frozen=True)
class Loads:
    """Runs load points, each on a server started for it; finished ones are only read.

    Attributes:
        servers: how the servers are started.
        plan: sessions are drawn from it.
        store: where finished points lie.
    """

    servers: Servers
    plan: SessionPlan
    store: PointStore
    objectives: Objectives

    def sessions(self, point: LoadPoint, system: System) -> Figures:
        """Agent sessions over HTTP: what the client saw, and what vLLM counted."""
        if (held := self.store.read(point)) is not None:
            return held
        workload = DrawnWorkload(self.plan)
        options = DriverOptions(point.max_sessions)
        with self.servers.running(system) as server:
            warm, before, result, after = asyncio.run(_drive_both(server, workload, point, options))
        found = figures(result, None, self.objectives)
        found |= difference(before, after)
        modes: tuple[Mode, ...] = ("shared", "isolated")
        tokens = self.servers.block_tokens
        found["work"] = {
            mode: dataclasses.asdict(block_work(result.sent, mode, warm.sent, tokens))
            for mode in modes
        }
        if found["errors"]:
            failed = next(r.error for r in result.requests if r.error)
            print(f"{point.label}: {found['errors']} calls failed, one with: {failed}", flush=True)
        self.store.write(point, found, result)
        return found

    def rates(self, point: LoadPoint) -> Rates:
        """Seconds a token on the stock process, with `point.max_sessions` requests at once."""
        if (held := self.store.read(point)) is None:
            with self.servers.running("stock") as server:
                rates = asyncio.run(_measure(server, self.plan, point.max_sessions))
            held = dataclasses.asdict(rates)
            self.store.write(point, held, LoadResult())
        return Rates(**held)

    def client(self, point: LoadPoint, system: System, prefix_tokens: int) -> Figures:
        """`vllm bench serve` with prompts that share prefixes, decoders in turn."""
        if (held := self.store.read(point)) is not None:
            return held
        with self.servers.running(system) as server:
            found = _vllm_bench(self.servers, server, self.plan, point, prefix_tokens)
        self.store.write(point, found, LoadResult())
        return found


async def _drive_both(
    server: Running, workload: DrawnWorkload, point: LoadPoint, options: DriverOptions
) -> tuple[LoadResult, dict[str, float], LoadResult, dict[str, float]]:
    async with HttpClient(server.url, extensions=True) as client:
        warm = await drive(client, workload.warm_up(point), options)
        if errors := [request.error for request in warm.requests if request.error]:
            raise SystemExit(f"{point.label}: the warm-up failed: {errors[0]}")
        before = await _counts(server)
        result = await drive(client, workload.sessions(point), options)
        await asyncio.sleep(COUNTERS_S)
        return warm, before, result, await _counts(server)


async def _counts(server: Running) -> dict[str, float]:
    if server.vllm_url is None:
        return {}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"{server.vllm_url}/metrics")
    return counts_of(answer.raise_for_status().text)


async def _measure(server: Running, plan: SessionPlan, at_once: int) -> Rates:
    generator = np.random.default_rng([plan.seed, 3])

    def prompts(count: int, tokens: int) -> list[tuple[int, ...]]:
        drawn = generator.choice(plan.vocabulary, size=(count, tokens))
        return [tuple(map(int, row)) for row in drawn]

    async with HttpClient(server.url) as client:

        async def seconds(names: Sequence[str], drawn: list[tuple[int, ...]], tokens: int) -> float:
            places = asyncio.Semaphore(at_once)

            async def one(number: int, prompt: tuple[int, ...]) -> None:
                call = Call("rates", names[number % len(names)], prompt, tokens)
                async with places:
                    reply = await client.generate(call)
                if reply.error is not None:
                    raise SystemExit(f"a call for vLLM's rates failed: {reply.error}")

            start = time.perf_counter()
            await asyncio.gather(*(one(*pair) for pair in enumerate(drawn)))
            return time.perf_counter() - start

        count = max(_LEAST_PREFILLS, at_once)
        # Once unmeasured: first calls load adapters and allocate.
        await seconds([BASE_NAME, *plan.decoders], prompts(1 + len(plan.decoders), 64), 2)
        base = await seconds([BASE_NAME], prompts(count, _PREFILL_TOKENS), 1)
        adapters = await seconds(plan.decoders, prompts(count, _PREFILL_TOKENS), 1)
        contexts = prompts(at_once, _CONTEXT_TOKENS + 1)
        await seconds(plan.decoders, contexts, 1)
        decode = await seconds(plan.decoders, contexts, _RESPONSE_TOKENS)
    prefilled = count * _PREFILL_TOKENS
    return Rates(base / prefilled, adapters / prefilled, decode / (at_once * _RESPONSE_TOKENS))


def _vllm_bench(
    servers: Servers, server: Running, plan: SessionPlan, point: LoadPoint, prefix_tokens: int
) -> Figures:
    suffix, response = 64, 32
    prefixes = max(1, point.sessions // 8)
    command = [str(servers.python), "-P", "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"]
    command += ["--model", plan.decoders[0], "--tokenizer", servers.base]
    command += ["--lora-modules", *plan.decoders, "--lora-assignment", "round-robin"]
    command += ["--dataset-name", "prefix_repetition", "--num-prompts", str(point.sessions)]
    command += ["--prefix-repetition-num-prefixes", str(prefixes)]
    command += ["--prefix-repetition-prefix-len", str(prefix_tokens)]
    command += ["--prefix-repetition-suffix-len", str(suffix)]
    command += ["--prefix-repetition-output-len", str(response)]
    command += ["--max-concurrency", str(point.max_sessions), "--seed", str(plan.seed)]
    command += ["--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", _PERCENTILES]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        done = subprocess.run(
            [*command, "--save-result", "--result-filename", str(file)],
            capture_output=True,
            text=True,
            timeout=_CLIENT_S,
            check=False,
        )
        if done.returncode or not file.is_file():
            raise SystemExit(
                f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
            )
        told: dict[str, Any] = json.loads(file.read_text())
    load = (
        f"prefix_repetition: {point.sessions} prompts of {prefix_tokens} shared and {suffix} own "
        f"tokens, {prefixes} prefixes, {response} response tokens, {point.max_sessions} at once, "
        f"{len(plan.decoders)} decoders in turn"
    )
    return client_figures(told) | {"system": point.variant, "load": load}


def client_figures(told: dict[str, Any]) -> Figures:
    """The figures that `vllm bench serve` saved, in seconds and under our names."""
    found: Figures = {
        "throughput_tok_s": told["output_throughput"],
        "requests_per_s": told["request_throughput"],
        "duration_s": told["duration"],
        "completed": told["completed"],
        "errors": told.get("failed", 0),
    }
    for theirs, ours in (("e2el", ""), ("ttft", "ttft_"), ("tpot", "tpot_")):
        for quantile in _PERCENTILES.split(","):
            found[f"{ours}p{quantile}_s"] = told[f"p{quantile}_{theirs}_ms"] / 1e3
    return found
