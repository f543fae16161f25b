"""What an engine is put together from, as its configuration asks."""

from __future__ import annotations

import psutil

from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.disaggregated import (
    ProcessWorker,
    divide_threads,
    shared_storage,
)
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.remote import RemoteWorker, hello_of
from prefillshare_train.serving.workers import InlineWorker, PrefillWorker, Report, ThreadWorker


def make_storage(models: ServedModels, config: EngineConfig) -> KVStorage:
    """Memory for as many blocks as the byte budget holds, the same number for each worker.

    Raises:
        ServingError: the budget does not hold two blocks a prefill worker, or is more than the
            memory that is free; processes are to share the memory of another device than the CPU.
    """
    geometry = KVGeometry.of(models.base)
    block_bytes = geometry.token_bytes * config.block_tokens
    each = config.kv_bytes // block_bytes // config.workers
    if each < 2:
        raise ServingError(
            f"kv_bytes ({config.kv_bytes}) holds fewer than two blocks of {block_bytes} bytes for "
            f"each of {config.workers} prefill workers; raise it"
        )
    blocks = each * config.workers
    device = models.base.device
    if config.disaggregated:
        if device.type != "cpu":
            raise ServingError(
                f"disaggregated prefill shares memory between processes on CPUs, and the base is "
                f"on {device}; load it with device cpu (--device cpu), or leave disaggregated out"
            )
        return shared_storage(geometry, blocks, config.block_tokens)
    needed, free = blocks * block_bytes, psutil.virtual_memory().available
    if device.type == "cpu" and needed > free:
        raise ServingError(
            f"kv_bytes asks for {needed >> 20} MiB and {free >> 20} MiB of memory are free; lower "
            "it"
        )
    return KVStorage(geometry, blocks, config.block_tokens, device=device)


def make_workers(
    models: ServedModels, config: EngineConfig, storage: KVStorage, report: Report
) -> dict[int, PrefillWorker]:
    """Prefill workers by number: one in the engine's thread, threads, processes, or addresses.

    Raises:
        ServingError: one does not come up or does not answer.
    """
    numbers = range(config.workers)
    if config.prefill_addresses:
        hello = hello_of(models.base_fingerprint, models.base)
        key = config.prefill_key.encode()
        return {
            n: RemoteWorker(n, address, key, hello, storage, report)
            for n, address in enumerate(config.prefill_addresses)
        }
    if config.disaggregated:
        threads = divide_threads(config.workers)
        return {n: ProcessWorker(n, models.base, storage, report, threads) for n in numbers}
    kind = InlineWorker if config.workers == 1 else ThreadWorker
    return {n: kind(n, models.base, storage, report) for n in numbers}
