"""What the store connector counts, on its way to the server's /metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTERS = {
    "hit_requests": "Decoder requests whose whole base part of the prompt was found.",
    "missed_requests": "Decoder requests that prefill with their own weights (policy recompute).",
    "refused_requests": "Decoder requests that end in an error instead (policy fail).",
    "waited_requests": "Decoder requests that waited for a prefill under way.",
    "waited_seconds": "Seconds that they waited.",
    "loaded_tokens": "Prompt tokens whose K/V came out of the store.",
    "loaded_blocks": "Blocks read from the store.",
    "loaded_bytes": "Bytes read from the store.",
    "written_blocks": "Blocks written to the store.",
    "written_bytes": "Bytes written to the store.",
    "evicted_blocks": "Blocks that this process removed to keep the budget.",
    "corrupt_blocks": "Blocks that were not what was written; each was removed.",
    "dropped_blocks": "Blocks that could not be written.",
}


class StoreStats(KVConnectorStats):
    """Counts since the last report, by the names in `COUNTERS`."""

    @classmethod
    def of(cls, counts: Counter[str]) -> StoreStats:
        """Take the counts; what they are taken from starts again at zero."""
        taken = cls(data=dict(counts))
        counts.clear()
        return taken

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> StoreStats:
        """Add another's counts to these."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log: what is not zero."""
        return {name: round(count, 3) for name, count in self.data.items() if count}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class StoreMetrics(KVConnectorPromMetrics):
    """`prefillshare_store_*_total` on /metrics."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"prefillshare_store_{name}",
                    documentation=text,
                    labelnames=self._labelnames,
                ),
                self.per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report."""
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)
