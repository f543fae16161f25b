"""Prefill workers at other addresses: the same answers, and no loss when one goes away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client

import pytest
from tests.serving.served import DECODERS, Collector, Oracle, engine_of, request

from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.remote import Hello, PrefillServer, RemoteWorker, parse_address

KEY = "a secret"


@contextmanager
def worker(models: ServedModels, fingerprint: str | None = None) -> Iterator[PrefillServer]:
    place = ("127.0.0.1", 0)
    server = PrefillServer(models.base, fingerprint or models.base_fingerprint, place, KEY.encode())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.close()


def address(server: PrefillServer) -> str:
    return f"127.0.0.1:{server.address[1]}"


def test_answers_are_the_same_with_evictions_copies_and_the_host_tier(
    models: ServedModels, oracle: Oracle
) -> None:
    with worker(models) as server:
        options = {"prefill_addresses": (address(server),), "prefill_key": KEY}
        with engine_of(models, 30, staging_bytes=4000, chunk_tokens=8, **options) as engine:
            for n in range(24):
                ids = tuple(range(10 + n % 4, 40 + n % 4 + n % 7))
                one = request([*DECODERS][n % 6], ids, 5)
                expected = oracle.answer(one.decoder, ids, 5)
                assert list(engine.generate(one).token_ids) == expected
            stats = engine.stats()
    assert stats.staged_in_bytes > 0
    assert stats.evicted_blocks > 0
    assert stats.handover_seconds > 0


def test_a_worker_that_hangs_up_is_replaced_by_the_other(
    models: ServedModels, oracle: Oracle
) -> None:
    with worker(models) as first, worker(models) as second:
        options = {"prefill_addresses": (address(first), address(second)), "prefill_key": KEY}
        with engine_of(models, 200, chunk_tokens=8, **options) as engine:
            found, sent = Collector(), []
            for n in range(16):
                sent.append(request([*DECODERS][n % 6], range(10 + n, 60 + n), 5))
                engine.submit(sent[-1], found)
                if n == 8:
                    lost = engine._loop.workers[0]
                    assert isinstance(lost, RemoteWorker)
                    lost._connection.close()
            assert engine.drain(60)
            assert engine.stats().workers_alive == 1
    for one in sent:
        expected = oracle.answer(one.decoder, one.prompt_ids, 5)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_strangers_are_turned_away_and_the_worker_stays(models: ServedModels) -> None:
    with worker(models) as server:
        place = {"prefill_addresses": (address(server),)}
        with pytest.raises(ServingError, match=r"no prefill worker answers|refuses"):
            engine_of(models, prefill_key="another", **place)
        with engine_of(models, prefill_key=KEY, **place) as engine:
            assert engine.generate(request("math", range(10, 20), 2)).token_ids
    with (
        worker(models, fingerprint="sha256:other") as server,
        pytest.raises(ServingError, match=r"refuses: it serves Hello.*sha256:other"),
    ):
        engine_of(models, prefill_addresses=(address(server),), prefill_key=KEY)


def test_faults_of_the_configuration_are_told(models: ServedModels) -> None:
    with pytest.raises(ServingError, match="not an address"):
        parse_address("9000")
    with pytest.raises(ServingError, match="need prefill_key"):
        engine_of(models, prefill_addresses=("127.0.0.1:1",))
    with pytest.raises(ServingError, match="leave prefill_workers"):
        engine_of(models, prefill_addresses=("127.0.0.1:1",), prefill_key=KEY, disaggregated=True)
    with pytest.raises(ServingError, match=r"no prefill worker answers at 127\.0\.0\.1:1"):
        engine_of(models, prefill_addresses=("127.0.0.1:1",), prefill_key=KEY)


def test_whatever_strangers_say_the_worker_stays(models: ServedModels) -> None:
    with worker(models) as server:
        silent = socket.create_connection(server.address)
        with socket.create_connection(server.address) as rude:
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
        key = KEY.encode()
        with Client(server.address, authkey=key) as odd:
            odd.send_bytes(b"not json")
        options = {"prefill_addresses": (address(server),), "prefill_key": KEY}
        with engine_of(models, **options) as engine:
            assert engine.generate(request("math", range(10, 20), 2)).token_ids
            with pytest.raises(ServingError, match="serves another engine"):
                engine_of(models, **options)
        silent.close()
        with engine_of(models, **options) as engine:
            assert engine.generate(request("math", range(10, 20), 2)).token_ids
        hello = Hello.of(models.base_fingerprint, KVGeometry.of(models.base))
        storage = KVStorage(KVGeometry.of(models.base), 4, 4)
        storage.blocks = 1 << 40
        with pytest.raises(ServingError, match="cannot hold the engine's K/V"):
            RemoteWorker(0, address(server), key, hello, storage, print)


def test_an_answer_that_makes_no_sense_loses_the_worker_and_hangs_nobody(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PrefillServer, "_run", lambda self, connection, *_: connection.send_bytes(b'{"shapes": []}')
    )
    with worker(models) as server:
        options = {"prefill_addresses": (address(server),), "prefill_key": KEY}
        with engine_of(models, **options) as engine:
            answer = engine.generate(request("math", range(10, 20), 2))
            assert (answer.finish_reason, answer.error) == ("error", "no prefill worker is left")
