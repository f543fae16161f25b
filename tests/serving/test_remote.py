"""Prefill workers at other addresses: the same answers, and no loss when one goes away."""

from __future__ import annotations

import copy
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from typing import Any

import pytest
from tests.serving.served import DECODERS, Collector, Oracle, engine_of, request

from prefillshare_train.core.contract import weights_fingerprint
from prefillshare_train.serving import engine as engine_module
from prefillshare_train.serving import remote, wire
from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import Piece
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.remote import PrefillServer, RemoteWorker, hello_of, parse_address
from prefillshare_train.serving.workers import PrefillReport

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
        pytest.raises(ServingError, match=r"refuses: .*: base_fingerprint is 'sha256:other' here"),
    ):
        engine_of(models, prefill_addresses=(address(server),), prefill_key=KEY)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
            r"config\.rope_parameters is \{.*777\.0.*\} here and \{.*\} in the engine",
        ),
        ({"sliding_window": 8}, r"config\.sliding_window is 8 here and None in the engine"),
        ({"rms_norm_eps": 0.5}, r"config\.rms_norm_eps is 0\.5 here and 1e-0\d in the engine"),
    ],
)
def test_the_same_weights_under_another_configuration_are_refused(
    models: ServedModels, change: dict[str, Any], named: str
) -> None:
    other = copy.deepcopy(models.base)
    for key, value in change.items():
        setattr(other.config, key, value)
    changed = copy.copy(models)
    changed.base = other
    assert weights_fingerprint(other) == models.base_fingerprint
    with worker(changed) as server, pytest.raises(ServingError, match=named):
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
        hello = hello_of(models.base_fingerprint, models.base)
        storage = KVStorage(KVGeometry.of(models.base), 4, 4)
        storage.blocks = 1 << 40
        with pytest.raises(ServingError, match="cannot hold the engine's K/V"):
            RemoteWorker(0, address(server), key, hello, storage, print)


@pytest.mark.parametrize("stalls", ["before its answer", "within its answer"])
def test_a_worker_that_freezes_is_given_up_and_decoding_goes_on(
    models: ServedModels, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, stalls: str
) -> None:
    monkeypatch.setattr(wire, "_STALL_S", 0.3)
    monkeypatch.setattr(remote, "_BATCH_S", 1.0)
    thawed = threading.Event()

    def freeze(self: PrefillServer, connection: Connection, *_: object) -> None:
        if stalls == "within its answer":
            os.write(connection.fileno(), b"\0")
        thawed.wait(60)

    with worker(models) as sound, worker(models) as frozen:
        places = (address(sound), address(frozen))
        with engine_of(models, 200, prefill_addresses=places, prefill_key=KEY) as engine:
            run_on = PrefillServer._run
            monkeypatch.setattr(
                PrefillServer,
                "_run",
                lambda self, *a: (freeze if self is frozen else run_on)(self, *a),
            )
            found = Collector()
            sent = [request("math", range(10 + n, 60 + n), 5) for n in range(6)]
            for one in sent:
                engine.submit(one, found)
            assert engine.drain(60)
            assert engine.stats().workers_alive == 1
        thawed.set()
    for one in sent:
        expected = oracle.answer(one.decoder, one.prompt_ids, 5)
        assert list(found.generation(one.request_id).token_ids) == expected


def test_a_worker_that_freezes_does_not_hold_up_the_end(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed, found = threading.Event(), Collector()
    monkeypatch.setattr(PrefillServer, "_run", lambda *_: thawed.wait(120))
    monkeypatch.setattr(engine_module, "_STOP_S", 1.0)
    with worker(models) as server:
        options = {"prefill_addresses": (address(server),), "prefill_key": KEY}
        engine = engine_of(models, **options)
        engine.start()
        one = request("math", range(10, 20), 2)
        engine.submit(one, found)
        while not engine.stats().prefilling:
            time.sleep(0.01)
        start = time.monotonic()
        engine.stop()
        assert time.monotonic() - start < 10
        assert found.done(one.request_id)
        thawed.set()


def test_a_worker_that_does_not_read_holds_up_nobody(
    models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_STALL_S", 0.3)
    with worker(models) as server:
        storage = KVStorage(KVGeometry.of(models.base), 4096, 64)
        hello = hello_of(models.base_fingerprint, models.base)
        thawed = threading.Event()
        monkeypatch.setattr(remote, "receive", _freezing(remote.receive, thawed))
        reports: queue.SimpleQueue[PrefillReport] = queue.SimpleQueue()
        far = RemoteWorker(0, address(server), KEY.encode(), hello, storage, reports.put)
        for block in range(storage.blocks):
            storage.versions[block] = 1
        start = time.monotonic()
        far.start([Piece((1,), range(storage.blocks * 64 - 1), range(1))])
        assert time.monotonic() - start < 5
        report = reports.get(timeout=60)
        assert report.lost
        assert "BlockingIOError" in report.error
        thawed.set()
        far.close()


def _freezing(receive: Any, thawed: threading.Event) -> Any:
    """A worker that reads no more once it has met its engine."""
    met = []

    def frozen(connection: Connection, *rest: Any) -> Any:
        if len(met) > 1:  # the greeting and its answer
            thawed.wait(60)
        met.append(1)
        return receive(connection, *rest)

    return frozen


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
