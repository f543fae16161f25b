"""Prefill workers at other addresses: prompts go there, K/V come back over TCP.

The engine keeps all bookkeeping, as with processes on one machine. A remote worker mirrors the
blocks that it has written or read: a batch brings along only blocks of its past that the engine
changed in between (copied, or brought back from the host tier). Messages are JSON and raw tensor
bytes, after a challenge with a shared key; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefillshare_train.core.contract import cache_config
from prefillshare_train.core.openmp import release_workers
from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import Piece, run_pieces
from prefillshare_train.serving.wire import HANDSHAKE_S, bound, connect, receive, send
from prefillshare_train.serving.workers import PrefillReport, Report

logger = logging.getLogger(__name__)
_BATCH_S = 600.0
_IDLE_S = 1.0  # between two looks at whether an idle worker has hung up


def parse_address(text: str) -> tuple[str, int]:
    """`host:port`.

    Raises:
        ServingError: it is not.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ServingError(f"{text!r} is not an address; give host:port")
    return host, int(port)


Hello = dict[str, Any]
"""What both ends must agree on before any K/V are exchanged, as JSON values."""

# Beside `cache_config`: what else makes the same weights compute other K/V.
_COMPUTED_KEYS = (
    *("rms_norm_eps", "hidden_act", "hidden_activation", "query_pre_attn_scalar"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    *("num_experts_per_tok", "norm_topk_prob"),
)


def hello_of(fingerprint: str, model: PreTrainedModel) -> Hello:
    """From a base and its `weights_fingerprint`."""
    geometry = KVGeometry.of(model)
    computed = {key: getattr(model.config, key, None) for key in _COMPUTED_KEYS}
    return {
        "base_fingerprint": fingerprint,
        "layers": geometry.layers,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "dtype": str(geometry.dtype),
        **{f"config.{key}": value for key, value in cache_config(model.config).items()},
        **{f"config.{key}": value for key, value in computed.items() if value is not None},
    }


def _differences(worker: Hello, engine: Hello) -> str:
    return "; ".join(
        f"{key} is {worker.get(key)!r} here and {engine.get(key)!r} in the engine"
        for key in sorted({*worker, *engine})
        if worker.get(key) != engine.get(key)
    )


class RemoteWorker:
    """A prefill worker at an address.

    Args:
        key: shared with the worker.
        hello: of the engine's base.

    Raises:
        ServingError: nobody answers, the key is wrong, or the worker has another base;
            what differs is named.
    """

    def __init__(
        self,
        number: int,
        address: str,
        key: bytes,
        hello: Hello,
        storage: KVStorage,
        report: Report,
    ) -> None:
        self._number = number
        self._storage = storage
        self._report = report
        self._known: dict[int, int] = {}
        try:
            self._connection = connect(parse_address(address), key)
            shape = {"blocks": storage.blocks, "block_tokens": storage.block_tokens}
            send(self._connection, {"hello": hello, **shape})
            if not self._connection.poll(HANDSHAKE_S):
                raise TimeoutError(f"no answer in {HANDSHAKE_S:.0f} s")
            answer, _ = receive(self._connection)
        except (OSError, EOFError) as error:
            raise ServingError(
                f"no prefill worker answers at {address} ({type(error).__name__}: {error}). Start "
                "one there with `prefillshare prefill-worker`, with the same key"
            ) from error
        except AuthenticationError as error:
            raise ServingError(f"the prefill worker at {address} refuses: {error}") from error
        if answer.get("error"):
            raise ServingError(f"the prefill worker at {address} refuses: {answer['error']}")
        self._batches: queue.SimpleQueue[tuple[list[Piece], list[int]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"remote-{number}", daemon=True)
        self._thread.start()

    def start(self, pieces: Sequence[Piece]) -> None:
        """Have the batch sent, with what the worker does not know of its past.

        The engine's thread, which decodes, does not wait for the network.
        """
        storage, size = self._storage, self._storage.block_tokens
        past = {slot // size for piece in pieces for slot in piece.past_slots}
        stale = [b for b in sorted(past) if self._known.get(b, 0) != storage.versions.get(b, 0)]
        for block in stale:
            self._known[block] = storage.versions[block]
        self._batches.put((list(pieces), stale))

    def close(self) -> None:
        """Hang up; the worker waits for its next engine."""
        self._batches.put(None)
        with contextlib.suppress(OSError):
            # Closing alone wakes nobody who waits for it.
            with socket.socket(fileno=os.dup(self._connection.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)
            self._connection.close()
        self._thread.join(10)

    def _serve(self) -> None:
        try:
            while True:
                try:
                    batch = self._batches.get(timeout=_IDLE_S)
                except queue.Empty:
                    if self._connection.poll():
                        raise EOFError("it hung up") from None
                    continue
                if batch is None:
                    return
                self._report(self._run(*batch))
        except Exception as error:  # whatever it is, nothing more can be expected from there
            reason = f"the connection to it broke ({type(error).__name__}: {error})"
            self._report(PrefillReport(self._number, 0.0, reason, lost=True))
            with contextlib.suppress(OSError):
                self._connection.close()

    def _run(self, pieces: list[Piece], stale: list[int]) -> PrefillReport:
        batch = [[list(p.ids), list(p.past_slots), list(p.write_slots)] for p in pieces]
        blocks = [self._storage.memory[:, :, block] for block in stale]
        send(self._connection, {"batch": batch, "stale": stale}, blocks)
        if not self._connection.poll(_BATCH_S):
            raise TimeoutError(f"no answer to a batch in {_BATCH_S:.0f} s")
        answer, tensors = receive(self._connection, self._storage.geometry.dtype)
        start = time.perf_counter()
        if answer["error"] is None:
            self._place(pieces, tensors)
        hop = answer["packed_s"] + time.perf_counter() - start
        return PrefillReport(self._number, answer["seconds"], answer["error"], handover_s=hop)

    def _place(self, pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> None:
        """Put the K/V that came back, (layers, 2, tokens, H_kv, D) a piece, where they belong."""
        flat = self._storage.memory.flatten(2, 3)
        for piece, content in zip(pieces, tensors, strict=True):
            slots = torch.tensor(list(piece.write_slots), device=flat.device)
            flat[:, :, slots] = content.to(flat.device)
        release_workers()  # this thread only waits now, and the engine's goes on


class PrefillServer:
    """Runs prompts for one engine after another.

    Args:
        address: to listen on; port 0 takes a free one.
        key: that engines must have.
        fingerprint: `weights_fingerprint` of the base.

    Attributes:
        address: that it listens on.
    """

    def __init__(
        self, model: PreTrainedModel, fingerprint: str, address: tuple[str, int], key: bytes
    ) -> None:
        self._model = model
        self._key = key
        self._geometry = KVGeometry.of(model)
        self._hello = hello_of(fingerprint, model)
        # The challenge is not left to the listener: a stranger who says nothing would block it.
        self._listener = Listener(address)
        self.address: tuple[str, int] = self._listener.address
        self._serving = threading.Lock()
        self._closed = False

    def serve_forever(self) -> None:
        """Serve until `close`; one engine at a time, others are told that it is busy."""
        release_workers()  # those that loading the model has left
        while not self._closed:
            try:
                connection = self._listener.accept()
                bound(connection)
            except OSError as error:
                if not self._closed:
                    logger.warning("a caller was lost: %s", error)
                continue
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        self._listener.close()

    def _meet(self, connection: Connection) -> None:
        """Serve a caller that has the key; whatever it does, the worker stays."""
        stranger = threading.Timer(HANDSHAKE_S, connection.close)
        stranger.daemon = True
        stranger.start()
        with connection:
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                hello, _ = receive(connection)
                stranger.cancel()
                self._serve(connection, hello)
            except EOFError:
                return
            except Exception as error:
                logger.warning("a caller was turned away: %s: %s", type(error).__name__, error)
            finally:
                stranger.cancel()

    def _serve(self, connection: Connection, hello: dict[str, Any]) -> None:
        if different := _differences(self._hello, hello["hello"]):
            advice = "start both on the same base folder, with the same --dtype"
            send(connection, {"error": f"its base is not the engine's: {different}; {advice}"})
            return
        if not self._serving.acquire(blocking=False):
            send(connection, {"error": "it serves another engine"})
            return
        try:
            try:
                storage = KVStorage(
                    self._geometry,
                    hello["blocks"],
                    hello["block_tokens"],
                    device=self._model.device,
                )
            except RuntimeError as error:
                send(connection, {"error": f"it cannot hold the engine's K/V: {error}"})
                return
            send(connection, {"error": None})
            while connection.poll(None):
                request, blocks = receive(connection, self._geometry.dtype)
                self._run(connection, storage, request, blocks)
        finally:
            self._serving.release()

    def _run(
        self,
        connection: Connection,
        storage: KVStorage,
        request: dict[str, Any],
        blocks: Sequence[Tensor],
    ) -> None:
        for block, content in zip(request["stale"], blocks, strict=True):
            storage.put_back(block, content)
        pieces = [Piece(*piece) for piece in request["batch"]]
        start = time.perf_counter()
        error = None
        try:
            run_pieces(self._model, storage, pieces, stop_early=True)
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
        ran = time.perf_counter()
        flat = storage.memory.flatten(2, 3)
        parts = [] if error else [flat[:, :, torch.tensor(list(p.write_slots))] for p in pieces]
        answer = {"error": error, "seconds": ran - start, "packed_s": time.perf_counter() - ran}
        send(connection, answer, parts)
