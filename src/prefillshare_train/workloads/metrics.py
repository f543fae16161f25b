"""Figures of one load point, from what the client saw and what the engine counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefillshare_train.serving.api import EngineStats
from prefillshare_train.workloads.driver import LoadResult, RequestRecord
from prefillshare_train.workloads.reuse import Work, speed_bound

Figures = dict[str, Any]


@dataclass(frozen=True)
class Objectives:
    """A request is good when it meets both limits, in seconds."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2

    def met(self, request: RequestRecord) -> bool:
        """Whether a request ended well and in time; a response of one token has no TPOT."""
        return (
            request.error is None
            and request.ttft_s is not None
            and request.ttft_s <= self.ttft_s
            and (request.tpot_s is None or request.tpot_s <= self.tpot_s)
        )


def figures(result: LoadResult, work: dict[str, Work] | None, objectives: Objectives) -> Figures:
    """All figures of a load.

    `p50_s` to `p99_s` are of whole sessions, from arrival to the end of the last call: the time
    that a session waits to be let in counts, so that a low cap on sessions cannot flatter a system.
    Latencies of requests carry their own names. `throughput_tok_s` is tokens of whole responses
    over the time from the first arrival to the last end.

    Args:
        work: the load's work by mode; None where token ids are unknown.
    """
    done = [request for request in result.requests if request.error is None]
    good = sum(objectives.met(request) for request in result.requests)
    ended = [s.end_s - s.at_s for s in result.sessions if s.error is None]
    tokens = sum(request.completion_tokens for request in done)
    seconds = result.duration_s
    found: Figures = {
        "throughput_tok_s": tokens / seconds,
        "requests_per_s": len(done) / seconds,
        "completed_sessions_per_s": len(ended) / seconds,
        "duration_s": seconds,
        **percentiles("", ended),
        **percentiles("request_", (request.total_s for request in done)),
        **percentiles("ttft_", (r.ttft_s for r in done if r.ttft_s is not None)),
        **percentiles("tpot_", (r.tpot_s for r in done if r.tpot_s is not None)),
        "goodput_share": good / len(result.requests) if result.requests else 0.0,
        "goodput_requests_per_s": good / seconds,
        "hit_ratio": _hit_ratio(done),
        "retries": sum(request.retries for request in result.requests),
        "errors": sum(request.error is not None for request in result.requests),
        "requests": len(result.requests),
    }
    found |= _engine_figures(result.before, result.after)
    if work is not None:
        found["hit_ratio_max_by_mode"] = {mode: w.hit_ratio for mode, w in work.items()}
        rates = found["prefill_s_per_token"], found["decode_s_per_token"]
        bound = None
        if None not in rates:
            bound = speed_bound(work["shared"], work["isolated"], *rates)
        found["bound"] = bound
    return found


def percentiles(prefix: str, values: Iterable[float]) -> Figures:
    """`{prefix}p50_s`, `p95` and `p99`; None where there are no values."""
    samples = list(values)
    if not samples:
        return {f"{prefix}p{q}_s": None for q in (50, 95, 99)}
    found = np.percentile(samples, (50, 95, 99))
    return {f"{prefix}p{q}_s": float(v) for q, v in zip((50, 95, 99), found, strict=True)}


def _hit_ratio(requests: list[RequestRecord]) -> float | None:
    """Cached over all prompt tokens of the base, or of the whole prompts where only they are known.

    Over HTTP the usage does not say how many tokens the base ran, which is all but the last few.
    """
    known = [r for r in requests if r.cached_tokens is not None and r.prompt_tokens is not None]
    total = sum(r.prompt_tokens if r.base_tokens is None else r.base_tokens for r in known)  # type: ignore[misc]
    return sum(r.cached_tokens or 0 for r in known) / total if total else None


def _engine_figures(before: EngineStats | None, after: EngineStats | None) -> Figures:
    if before is None or after is None:
        names = ("peak_kv_bytes", "staged_bytes", "prefill_s_per_token", "decode_s_per_token")
        return dict.fromkeys(names)
    prefilled = after.prefilled_tokens - before.prefilled_tokens
    decoded = after.completion_tokens - before.completion_tokens
    steps = after.decode_steps - before.decode_steps
    return {
        "peak_kv_bytes": after.peak_kv_bytes,
        "staged_bytes": after.staged_out_bytes
        + after.staged_in_bytes
        - before.staged_out_bytes
        - before.staged_in_bytes,
        "evicted_blocks": after.evicted_blocks - before.evicted_blocks,
        "prefilled_tokens": prefilled,
        "prefill_s_per_token": _ratio(after.prefill_seconds - before.prefill_seconds, prefilled),
        "decode_s_per_token": _ratio(after.decode_seconds - before.decode_seconds, decoded),
        "decode_rows_per_step": _ratio(after.decode_rows - before.decode_rows, steps),
    }


def _ratio(value: float, count: int) -> float | None:
    return value / count if count else None
