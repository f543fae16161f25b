"""What the router measures beside what our own server does: by replica, and by decoder."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefillshare_train.engines.vllm.router.replicas import Fleet

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class RouterMetrics(Collector):
    """Counts and measures, in a registry of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.prefill_seconds = self._histogram(
            "prefill_seconds", "A prefill call, queueing at the instance included.", "replica"
        )
        self.first_token_seconds = self._histogram(
            "decode_first_token_seconds",
            "From the decode call to its first token: transfer, and the decoder's own tokens.",
            "decoder",
            "replica",
        )
        self.retries = self._counter(
            "retries", "Tries that failed and were followed by another.", "decoder", "reason"
        )
        self.failures = self._counter(
            "upstream_failures", "Calls to an instance that failed.", "replica", "reason"
        )
        self.restarts = self._counter(
            "replica_restarts", "Times that an instance came back as a new process.", "replica"
        )
        self.expected_cached = self._counter(
            "expected_cached_tokens",
            "Prompt tokens that the chosen prefill replica was thought to keep.",
            "replica",
        )
        self.cached = self._counter(
            "cached_tokens", "Prompt tokens that the prefill replica says it had kept.", "replica"
        )
        self.unshared = self._counter(
            "unshared_tokens",
            "Prompt tokens that a decoder ran though the base should have. Not 0: answers differ "
            "from what the decoder was trained for.",
            "decoder",
        )
        for name in fleet.pools:
            self.unshared.labels(name)

    def describe(self) -> Iterable[Metric]:
        """Nothing, as its gauges are read at each scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Gauges of now."""
        labels = ["replica", "role"]
        families = {
            "up": GaugeMetricFamily(
                "prefillshare_router_replica_up", "Whether it answers.", labels=labels
            ),
            "draining": GaugeMetricFamily(
                "prefillshare_router_replica_draining", "Whether it drains.", labels=labels
            ),
            "running": GaugeMetricFamily(
                "prefillshare_router_replica_running",
                "Prefills and responses that are there or on their way.",
                labels=labels,
            ),
            "load_tokens": GaugeMetricFamily(
                "prefillshare_router_replica_load_tokens",
                "Tokens of their prompts that it has to run or to hold.",
                labels=labels,
            ),
        }
        for replica in list(self._fleet.replicas.values()):
            for name, family in families.items():
                family.add_metric([replica.address, replica.role], float(getattr(replica, name)))
        yield from families.values()
        kept = GaugeMetricFamily(
            "prefillshare_router_replica_kept_blocks",
            "Blocks that a prefill replica is thought to keep.",
            labels=["replica"],
        )
        for replica in list(self._fleet.prefill):
            kept.add_metric([replica.address], len(replica.kept))
        yield kept

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prefillshare_router_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(
            f"prefillshare_router_{name}", text, labels, buckets=_SECONDS, registry=self.registry
        )
