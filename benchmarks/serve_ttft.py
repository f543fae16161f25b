"""TTFT of the second, third and fourth agent on an unchanged context, against a cold one."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import numpy as np
from serve_setup import Lab
from tqdm import tqdm

from prefillshare_train.cli.bench_targets import engine_config
from prefillshare_train.serving.config import Mode
from prefillshare_train.serving.engine import Engine
from prefillshare_train.workloads.client import Call, in_process
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.machine import machine
from prefillshare_train.workloads.points import LoadPoint


def ttft(lab: Lab, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One request at a time: every decoder answers each context once, the first one cold.

    Returns:
        A row a mode and prompt length: medians of TTFT, of the first agent and of the others.
    """
    rows = []
    modes: tuple[Mode, ...] = ("shared", "isolated")
    total = len(options.ttft_prompts) * len(modes) * (options.ttft_contexts + 1)
    with tqdm(total=total, unit="context", desc="ttft") as bar:
        for prompt_tokens in options.ttft_prompts:
            for mode in modes:
                times = asyncio.run(_times(lab, mode, prompt_tokens, options.ttft_contexts, bar))
                first, later = times[:, 0], times[:, 1:]
                rows.append(
                    {
                        "mode": mode,
                        "decoders": times.shape[1],
                        "prompt_tokens": prompt_tokens,
                        "contexts": times.shape[0],
                        "ttft_cold_s": float(np.median(first)),
                        "ttft_later_s": float(np.median(later)),
                        "ttft_later_p95_s": float(np.percentile(later, 95)),
                        "share_of_cold": float(np.median(later) / np.median(first)),
                        "machine": machine(),
                    }
                )
    return rows


async def _times(lab: Lab, mode: Mode, tokens: int, contexts: int, bar: tqdm[Any]) -> np.ndarray:
    """Seconds to the first token, (contexts, decoders); one context before them warms up."""
    names = lab.plan.decoders
    generator = np.random.default_rng([lab.plan.seed, tokens])
    point = LoadPoint(
        experiment="ttft",
        workload="uniform",
        regime="compute",
        mode=mode,
        decoders=len(names),
        sessions_per_s=None,
        max_sessions=1,
        sessions=contexts,
        kv_bytes=int(1.5 * lab.token_bytes * len(names) * (contexts + 1) * (tokens + 32)),
    )
    found = []
    async with in_process(Engine(lab.models, engine_config(point))) as client:
        for _ in range(contexts + 1):
            drawn = generator.integers(len(lab.plan.vocabulary), size=tokens)
            prompt = tuple(lab.plan.vocabulary[i] for i in drawn)
            times = []
            for name in names:
                reply = await client.generate(Call("ttft", name, prompt, 2))
                if reply.ttft_s is None:
                    raise WorkloadError(f"ttft, {mode}, {tokens} tokens: {reply.error}")
                times.append(reply.ttft_s)
            found.append(times)
            bar.update(1)
    return np.array(found[1:])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| mode | prompt tokens | cold TTFT ms | later agents ms | p95 ms | of cold |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['mode']} | {r['prompt_tokens']} | {1e3 * r['ttft_cold_s']:.0f} | "
        f"{1e3 * r['ttft_later_s']:.1f} | {1e3 * r['ttft_later_p95_s']:.1f} | "
        f"{100 * r['share_of_cold']:.1f} % |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"
