"""What the store connector takes as options, and the instances on which it does not run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.store_options import StoreOptions, check_supported


def test_options_are_checked(tmp_path: Path) -> None:
    assert StoreOptions.read({"path": str(tmp_path), "budget_gib": 0.01}).budget_bytes == 10737418
    for given, message in (
        ({"pth": "x"}, "pth"),
        ({"budget_gib": "many"}, "budget_gib"),
        ({"wait_s": -1}, "wait_s"),
        ({"on_miss": "guess"}, "on_miss"),
        ({"path": str(tmp_path), "budget_gib": 1e9}, "the file system of"),
    ):
        with pytest.raises(VllmError, match=message):
            StoreOptions.read(given)


class FullAttentionSpec:
    def __init__(self, sliding_window: int | None = None) -> None:
        self.sliding_window = sliding_window


class MambaSpec:
    pass


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"speculative": SimpleNamespace(method="eagle")}, "speculative_config is 'eagle'"),
        ({"quantization": "fp8"}, "quantization is 'fp8'"),
        ({"hf_overrides": {"rope_theta": 1}}, "hf_overrides"),
        ({"revision": "v1.1"}, "revision is 'v1.1'"),
        ({"specs": [FullAttentionSpec(), MambaSpec()]}, "MambaSpec"),
        ({"specs": [FullAttentionSpec(128)]}, "sliding_window is 128"),
        ({"hash_block_size": 16}, "hash_block_size is 16"),
        ({"policy": "recompute"}, "kv_load_failure_policy is 'recompute'.*see on_miss"),
        ({}, None),
    ],
)
def test_instances_that_cannot_share_exactly_are_refused_by_name(
    values: dict[str, Any], named: str | None
) -> None:
    specs = values.get("specs", [FullAttentionSpec()])
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=values.get("policy", "fail")),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=values.get("tensor_parallel_size", 1),
            pipeline_parallel_size=values.get("pipeline_parallel_size", 1),
        ),
        model_config=SimpleNamespace(
            quantization=values.get("quantization"),
            hf_overrides=values.get("hf_overrides", {}),
            revision=values.get("revision"),
        ),
        speculative_config=values.get("speculative"),
        cache_config=SimpleNamespace(block_size=32),
    )
    kv = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs],
        hash_block_size=values.get("hash_block_size"),
    )
    if named is None:
        check_supported(config, kv)
        return
    with pytest.raises(VllmError, match=named):
        check_supported(config, kv)
