"""How pools grow and shrink by vLLM's own metrics, as far as a manifest can say it."""

from __future__ import annotations

from typing import Any

from prefillshare_train.engines.vllm.topology import Pool

# What a pool scales by: metrics of vLLM's own /metrics, under the names that ADAPTER_RULE gives.
_SCALE_BY = {
    "prefill": ("vllm_num_requests_waiting", "2"),
    "decode": ("vllm_kv_cache_usage_perc", "800m"),
    "both": ("vllm_num_requests_waiting", "2"),
}
ADAPTER_RULE = """\
- seriesQuery: '{__name__=~"^vllm:(num_requests_waiting|kv_cache_usage_perc)$"}'
  resources:
    overrides: {namespace: {resource: namespace}, pod: {resource: pod}}
  name: {matches: "^vllm:(.*)$", as: "vllm_${1}"}
  metricsQuery: 'sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)'
"""
"""For prometheus-adapter: names with a colon cannot be asked for through Kubernetes' API."""


def scaler(pool: Pool, metadata: dict[str, Any], max_replicas: int) -> dict[str, Any]:
    """A pool's HorizontalPodAutoscaler."""
    metric, target = _SCALE_BY[pool.role]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": pool.name},
            "minReplicas": pool.replicas,
            "maxReplicas": max(pool.replicas, max_replicas),
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": metric},
                        "target": {"type": "AverageValue", "averageValue": target},
                    },
                }
            ],
            # An instance takes minutes to start, and takes its kept prefixes with it as it goes.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 900}},
        },
    }
