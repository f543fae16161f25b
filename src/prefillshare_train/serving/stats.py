"""Counters of the engine, and the snapshot that callers get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from prefillshare_train.serving.api import EngineStats, Usage
from prefillshare_train.serving.prefix_cache import PrefixCache
from prefillshare_train.serving.scheduler import Scheduler
from prefillshare_train.serving.sessions import SessionTable


@dataclass
class Sums:
    """Sums since the engine was made; see `EngineStats` for each."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    prefill_batches: int = 0
    handover_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_rows: int = 0
    evicted_blocks: int = 0
    staged_out_bytes: int = 0
    staged_in_bytes: int = 0

    def add(self, usage: Usage) -> None:
        """Count a request that has ended."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.prefilled_tokens += usage.prefilled_tokens
        self.completion_tokens += usage.completion_tokens

    def keep(self, cache: PrefixCache) -> None:
        """Count what a cache did that is about to be dropped."""
        self.evicted_blocks += cache.pool.evicted
        self.staged_out_bytes += cache.staged_out_bytes
        self.staged_in_bytes += cache.staged_in_bytes


def collect_stats(
    scheduler: Scheduler,
    sessions: SessionTable,
    caches: Sequence[PrefixCache],
    sums: Sums,
    *,
    waiting: int,
    finished: dict[str, int],
    workers_alive: int,
    workers_total: int,
) -> EngineStats:
    """A snapshot; may be taken from any thread, so figures may be one step apart."""
    pools = [cache.pool for cache in caches]
    total = dataclasses.replace(sums)
    for cache in caches:
        total.keep(cache)
    block_bytes = scheduler.storage.block_bytes
    return EngineStats(
        waiting=waiting,
        prefilling=len(scheduler.prefilling),
        decoding=len(scheduler.ready) + len(scheduler.starting) + len(scheduler.decoding),
        sessions=len(sessions),
        sessions_waiting=scheduler.sessions_waiting,
        blocks_total=sum(pool.size for pool in pools),
        blocks_used=sum(pool.held for pool in pools),
        blocks_cached=sum(pool.cached for pool in pools),
        block_tokens=scheduler.storage.block_tokens,
        block_bytes=block_bytes,
        peak_kv_bytes=sum(pool.peak_filled for pool in pools) * block_bytes,
        staged_blocks=sum(cache.staged_blocks for cache in caches),
        retokenized_misses=sessions.retokenized,
        finished=finished,
        workers_alive=workers_alive,
        workers_total=workers_total,
        **dataclasses.asdict(total),
    )
