"""K/V through a directory of blocks: the base writes them, decoders read them.

    --kv-transfer-config '{"kv_connector": "PrefillShareStoreConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"path": "/dev/shm/prefillshare"}}'

`kv_both` is for the base, with LoRA decoders or alone (it then reads what it wrote before a
restart); `kv_consumer` for an instance that only decodes. What happens to a decoder's request whose
K/V are missing is `on_miss` of the extra configuration: `fail`, the default, or `recompute`.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.version import __version__

from prefillshare_train.engines.vllm import base_rows
from prefillshare_train.engines.vllm.block_store import BlockStore
from prefillshare_train.engines.vllm.store_options import StoreOptions, check_supported
from prefillshare_train.engines.vllm.store_roles import Roles
from prefillshare_train.engines.vllm.store_scheduler import StoreScheduler, Work
from prefillshare_train.engines.vllm.store_stats import StoreMetrics, StoreStats
from prefillshare_train.engines.vllm.store_worker import StoreWorker

logger = init_logger("vllm." + __name__)


class StoreMetadata(KVConnectorMetadata):
    """The work of one step, from scheduler to worker."""

    def __init__(self, work: Work) -> None:
        self.work = work


class PrefillShareStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's interface to the two halves; there is one object for each.

    Raises:
        ContractError: a decoder does not fit the base.
        VllmError: an option is wrong, or the instance is one that cannot share K/V exactly.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        options = StoreOptions.read(transfer.kv_connector_extra_config)
        check_supported(vllm_config, kv_cache_config)
        base_rows.protect_on_cpu()
        roles = Roles(vllm_config, options)
        namespace = _namespace(roles.prefill_id.digest, vllm_config, kv_cache_config)
        self._store = BlockStore(
            options.path, namespace, options.budget_bytes, checksums=options.checksums
        )
        if role is KVConnectorRole.WORKER:
            self._worker = StoreWorker(self._store, kv_cache_config.num_blocks)
            self._failed: set[int] = set()
            self._ended: set[str] = set()
            return
        recompute = options.on_miss == "recompute"
        self._scheduler = StoreScheduler(
            self._store,
            roles,
            namespace=namespace,
            block_size=vllm_config.cache_config.block_size,
            produce=transfer.is_kv_producer,
            consume=transfer.is_kv_consumer,
            recompute=recompute,
            wait_s=options.wait_s,
        )
        logger.info("block store %s/%s, %s", options.path, namespace, roles.prefill_id)
        if recompute:
            logger.warning(
                "on_miss is recompute: a decoder whose K/V are missing answers from its OWN "
                "prefill, which it was not trained for"
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not written is a miss later on, no loss."""
        return False

    # Scheduler

    def on_new_request(self, request: Any) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        (block_ids,) = blocks.get_block_ids()
        self._scheduler.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StoreMetadata:
        return StoreMetadata(self._scheduler.step(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        self._scheduler.finished(request)
        return False, None

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        work = self._get_connector_metadata().work
        self._worker.load(work)
        self._failed |= work.unfilled
        self._ended |= work.failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata().work)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str] | None]:
        ended, self._ended = self._ended, set()
        return None, ended or None

    # Both

    def get_kv_connector_stats(self) -> StoreStats | None:
        half = self._worker if self._role is KVConnectorRole.WORKER else self._scheduler
        half.counts.update(self._store.counts)
        self._store.counts.clear()
        return StoreStats.of(half.counts) if half.counts else None

    def shutdown(self) -> None:
        self._store.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> StoreStats:
        return StoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> StoreMetrics:
        return StoreMetrics(*args)


def _namespace(prefill_digest: str, vllm_config: Any, kv_cache_config: Any) -> str:
    """Blocks are kept as they lie in the cache, so what lays them out must be the same as well."""
    layout: Iterable[Any] = (
        prefill_digest,
        __version__,
        current_platform.device_type,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else "",
        getattr(kv_cache_config, "kv_cache_layout", None),
        getattr(vllm_config.attention_config, "backend", None),
    )
    return hashlib.sha256("\n".join(map(str, layout)).encode()).hexdigest()[:32]
