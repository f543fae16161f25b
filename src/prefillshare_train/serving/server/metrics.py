"""What the server measures: Prometheus' histograms and counters, and the page's recent figures."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefillshare_train.serving.api import EngineStats, Event, Usage
from prefillshare_train.serving.server.responses import DecoderStats, Stats

_RECENT = 128
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("requests_waiting", "Requests that wait.", lambda s: s.waiting),
    ("requests_prefilling", "Requests whose prompt is being prefilled.", lambda s: s.prefilling),
    ("requests_decoding", "Requests that decode.", lambda s: s.decoding),
    ("sessions", "Sessions that hold a reservation.", lambda s: s.sessions),
    ("sessions_waiting", "Sessions that wait for a reservation.", lambda s: s.sessions_waiting),
    ("kv_blocks", "Blocks of the KV pool.", lambda s: s.blocks_total),
    ("kv_blocks_used", "Blocks that requests or sessions hold.", lambda s: s.blocks_used),
    (
        "kv_blocks_cached",
        "Blocks that nobody holds and a prompt may find.",
        lambda s: s.blocks_cached,
    ),
    ("kv_block_bytes", "Bytes of a block.", lambda s: s.block_bytes),
    ("kv_peak_bytes", "Most bytes that held or findable blocks took.", lambda s: s.peak_kv_bytes),
    ("kv_staged_blocks", "Blocks in the host tier.", lambda s: s.staged_blocks),
    (
        "prefix_hit_ratio",
        "Share of all prompt tokens that were found cached.",
        lambda s: hit_ratio(s) or 0.0,
    ),
    ("prefill_workers", "Prefill workers.", lambda s: s.workers_total),
    ("prefill_workers_alive", "Prefill workers that are alive.", lambda s: s.workers_alive),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("kv_staged_out_bytes", "Bytes moved to the host tier.", lambda s: s.staged_out_bytes),
    ("kv_staged_in_bytes", "Bytes moved back from the host tier.", lambda s: s.staged_in_bytes),
    ("kv_evicted_blocks", "Findable blocks given up for room.", lambda s: s.evicted_blocks),
    (
        "retokenized_misses",
        "Turns whose session had generated other ids for the same place.",
        lambda s: s.retokenized_misses,
    ),
    ("prefill_seconds", "Time in forward passes over prompts.", lambda s: s.prefill_seconds),
    ("decode_seconds", "Time in forward passes over responses.", lambda s: s.decode_seconds),
    ("decode_steps", "Decoding steps.", lambda s: s.decode_steps),
    ("decode_rows", "Rows, summed over decoding steps.", lambda s: s.decode_rows),
)


def hit_ratio(stats: EngineStats) -> float | None:
    """Share of all prompt tokens so far that were found cached; None before the first."""
    return stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else None


class ServerMetrics:
    """Counts and measures; safe to call from any thread.

    Args:
        decoders: whose rows are there from the start.
        stats: of the engine.
        more: metrics that this engine has beside those.
    """

    def __init__(
        self,
        decoders: Sequence[str],
        stats: Callable[[], EngineStats],
        more: Sequence[Collector] = (),
    ) -> None:
        self._stats = stats
        self._started = time.monotonic()
        self._registry = CollectorRegistry()
        for collector in (_EngineCollector(stats), *more):
            self._registry.register(collector)
        self._responses = self._counter(
            "responses", "Responses that ended, by reason.", "decoder", "finish_reason"
        )
        self._tokens = self._counter(
            "tokens",
            "Tokens by kind: prompt, cached, prefilled, decoder_prompt, completion.",
            "decoder",
            "kind",
        )
        self._answers = self._counter("http_responses", "HTTP answers by status.", "status")
        self._gone = self._counter("clients_gone", "Clients that left before their answer.")
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Submission to first response token.", _LONG
        )
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Between response tokens after the first.", _SHORT
        )
        self._total = self._histogram(
            "request_duration_seconds", "Submission to the end of the response.", _LONG
        )
        self._queued = self._histogram(
            "queue_seconds", "Submission until the prefill could begin.", _LONG
        )
        self._lock = threading.Lock()
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_RECENT) for name in decoders}
        self._counts = dict.fromkeys(decoders, 0)
        for decoder in decoders:
            for family in (self._ttft, self._tpot, self._total, self._queued):
                family.labels(decoder)

    def finished(self, decoder: str, event: Event) -> None:
        """Note the last event of a response."""
        self._responses.labels(decoder, event.finish_reason).inc()
        usage = event.usage
        if usage is None or not usage.started:
            return
        kinds = {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "prefilled": usage.prefilled_tokens,
            "decoder_prompt": usage.decoder_prompt_tokens,
            "completion": usage.completion_tokens,
        }
        for kind, count in kinds.items():
            self._tokens.labels(decoder, kind).inc(count)
        if event.finish_reason in ("stop", "length"):
            self._time(decoder, usage)

    def answered(self, status: int) -> None:
        """Note an HTTP answer."""
        self._answers.labels(str(status)).inc()

    def client_gone(self) -> None:
        """Note a client that left before its answer was complete."""
        self._gone.inc()

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def snapshot(self, *, accepting: bool) -> Stats:
        """What the page shows."""
        engine = self._stats()
        with self._lock:
            decoders = {
                name: _recent(self._counts[name], list(values))
                for name, values in self._recent.items()
            }
        return Stats(
            uptime_s=time.monotonic() - self._started,
            accepting=accepting,
            hit_ratio=hit_ratio(engine),
            decoders=decoders,
            engine=engine,
        )

    def _time(self, decoder: str, usage: Usage) -> None:
        self._total.labels(decoder).observe(usage.total_s)
        self._queued.labels(decoder).observe(usage.queued_s)
        if usage.ttft_s is None:
            return
        self._ttft.labels(decoder).observe(usage.ttft_s)
        if usage.completion_tokens > 1:
            decoding = usage.total_s - usage.ttft_s
            self._tpot.labels(decoder).observe(decoding / (usage.completion_tokens - 1))
        with self._lock:
            self._recent[decoder].append(usage.ttft_s)
            self._counts[decoder] += 1

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prefillshare_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"prefillshare_{name}", text, ["decoder"], buckets=buckets, registry=self._registry
        )


class _EngineCollector(Collector):
    """Reads the engine's own counters at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration does not need an engine that runs."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The engine's counters and gauges of now."""
        stats = self._stats()
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(f"prefillshare_{name}", text, value=value(stats))
        for name, text, value in _COUNTERS:
            yield CounterMetricFamily(f"prefillshare_{name}", text, value=value(stats))


def _recent(count: int, values: list[float]) -> DecoderStats:
    if not values:
        return DecoderStats(responses=count, ttft_last_s=None, ttft_p50_s=None, ttft_p95_s=None)
    ordered = sorted(values)
    return DecoderStats(
        responses=count,
        ttft_last_s=values[-1],
        ttft_p50_s=statistics.median(ordered),
        ttft_p95_s=ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
    )
