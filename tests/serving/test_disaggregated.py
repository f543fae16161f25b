"""Prefill in processes of its own: the same answers, and no loss when one is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from tests.serving.served import DECODERS, Collector, Oracle, engine_of, request

from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.disaggregated import shared_storage
from prefillshare_train.serving.kv_storage import KVGeometry
from prefillshare_train.serving.models import ServedModels


@pytest.fixture(autouse=True)
def keep_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_processes_answer_alike_and_survive_a_kill(models: ServedModels, oracle: Oracle) -> None:
    sent = [
        request([*DECODERS][n % 6], tuple(range(10 + n % 4, 50 + n % 4)), 6, session=f"s{n % 5}")
        for n in range(20)
    ]
    with engine_of(models, 300, prefill_workers=2, disaggregated=True, chunk_tokens=8) as engine:
        found = Collector()
        for n, one in enumerate(sent):
            engine.submit(one, found)
            if n == 10:
                os.kill(engine._loop.workers[0].process.pid, signal.SIGKILL)
        assert engine.drain(120)
        deadline = time.monotonic() + 10
        while engine.stats().workers_alive == 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        stats = engine.stats()
    assert stats.workers_alive == 1
    assert stats.prefill_batches > 0
    assert 0 < stats.handover_seconds / stats.prefill_batches < 1
    for one in sent:
        expected = oracle.answer(one.decoder, one.prompt_ids, 6)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_too_little_shared_memory_is_told() -> None:
    geometry = KVGeometry(64, 64, 128, torch.float32)
    with pytest.raises(ServingError, match=r"needs \d+ MiB of shared memory"):
        shared_storage(geometry, 1 << 20, 16)


def test_another_device_than_the_cpu_is_refused(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors would meet the CPU's in the first step."""
    monkeypatch.setattr(type(models.base), "device", property(lambda _: torch.device("meta")))
    with pytest.raises(ServingError, match=r"on CPUs, and the base is on meta.*--device cpu"):
        engine_of(models, 64, disaggregated=True)
