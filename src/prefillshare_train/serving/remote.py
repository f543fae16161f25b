"""Prefill workers at other addresses: prompts go there, K/V come back over TCP.

The engine keeps all bookkeeping, as with processes on one machine. A remote worker mirrors the
blocks that it has written or read: a batch brings along only blocks of its past that the engine
changed in between (copied, or brought back from the host tier). Messages are JSON and raw tensor
bytes, after a challenge with a shared key; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefillshare_train.core.openmp import release_workers
from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import Piece, run_pieces
from prefillshare_train.serving.workers import PrefillReport, Report

logger = logging.getLogger(__name__)
_HANDSHAKE_S = 30.0
_BATCH_S = 600.0


def parse_address(text: str) -> tuple[str, int]:
    """`host:port`.

    Raises:
        ServingError: it is not.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ServingError(f"{text!r} is not an address; give host:port")
    return host, int(port)


@dataclass(frozen=True)
class Hello:
    """What both ends must agree on before any K/V are exchanged."""

    base_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, fingerprint: str, geometry: KVGeometry) -> Hello:
        """From a base's weights and the shape of its K/V."""
        g = geometry
        return cls(fingerprint, g.layers, g.kv_heads, g.head_dim, str(g.dtype))


class RemoteWorker:
    """A prefill worker at an address.

    Args:
        key: shared with the worker.
        hello: of the engine's base.

    Raises:
        ServingError: nobody answers, the key is wrong, or the worker has another base.
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
        self._sent_at: float | None = None
        try:
            self._connection: Connection = Client(parse_address(address), authkey=key)
            shape = {"blocks": storage.blocks, "block_tokens": storage.block_tokens}
            _send(self._connection, {"hello": asdict(hello), **shape})
            if not self._connection.poll(_HANDSHAKE_S):
                raise TimeoutError(f"no answer in {_HANDSHAKE_S:.0f} s")
            answer, _ = _receive(self._connection)
        except (OSError, EOFError) as error:
            raise ServingError(
                f"no prefill worker answers at {address} ({type(error).__name__}: {error}). Start "
                "one there with `prefillshare prefill-worker`, with the same key"
            ) from error
        except AuthenticationError as error:
            raise ServingError(f"the prefill worker at {address} refuses: {error}") from error
        if answer.get("error"):
            raise ServingError(f"the prefill worker at {address} refuses: {answer['error']}")
        self._pieces: list[Piece] = []
        self._thread = threading.Thread(target=self._listen, name=f"remote-{number}", daemon=True)
        self._thread.start()

    def start(self, pieces: Sequence[Piece]) -> None:
        """Send the batch, with what the worker does not know of its past.

        Raises:
            OSError: the worker is gone.
        """
        storage, size = self._storage, self._storage.block_tokens
        past = {slot // size for piece in pieces for slot in piece.past_slots}
        stale = [b for b in sorted(past) if self._known.get(b, 0) != storage.versions.get(b, 0)]
        for block in stale:
            self._known[block] = storage.versions[block]
        self._pieces = list(pieces)
        self._sent_at = time.monotonic()
        batch = [[list(p.ids), list(p.past_slots), list(p.write_slots)] for p in pieces]
        blocks = [storage.memory[:, :, block] for block in stale]
        _send(self._connection, {"batch": batch, "stale": stale}, blocks)

    def close(self) -> None:
        """Hang up; the worker waits for its next engine."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._thread.join(10)

    def _listen(self) -> None:
        try:
            while True:
                self._await_answer()
                answer, tensors = _receive(self._connection, self._storage.geometry.dtype)
                start = time.perf_counter()
                if answer["error"] is None:
                    self._place(tensors)
                hop = answer["packed_s"] + time.perf_counter() - start
                seconds, error = answer["seconds"], answer["error"]
                self._sent_at = None
                self._report(PrefillReport(self._number, seconds, error, handover_s=hop))
        except Exception as error:  # whatever it is, nothing more can be expected from there
            reason = f"the connection to it broke ({type(error).__name__}: {error})"
            self._report(PrefillReport(self._number, 0.0, reason, lost=True))

    def _await_answer(self) -> None:
        while not self._connection.poll(1.0):
            sent = self._sent_at
            if sent is not None and time.monotonic() - sent > _BATCH_S:
                self._connection.close()
                raise TimeoutError(f"no answer to a batch in {_BATCH_S:.0f} s")

    def _place(self, tensors: Sequence[Tensor]) -> None:
        """Put the K/V that came back, (layers, 2, tokens, H_kv, D) a piece, where they belong."""
        flat = self._storage.memory.flatten(2, 3)
        for piece, content in zip(self._pieces, tensors, strict=True):
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
        self._hello = Hello.of(fingerprint, self._geometry)
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
        stranger = threading.Timer(_HANDSHAKE_S, connection.close)
        stranger.daemon = True
        stranger.start()
        with connection:
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                hello, _ = _receive(connection)
                stranger.cancel()
                self._serve(connection, hello)
            except EOFError:
                return
            except Exception as error:
                logger.warning("a caller was turned away: %s: %s", type(error).__name__, error)
            finally:
                stranger.cancel()

    def _serve(self, connection: Connection, hello: dict[str, Any]) -> None:
        theirs = Hello(**hello["hello"])
        if theirs != self._hello:
            _send(connection, {"error": f"it serves {self._hello}, the engine {theirs}"})
            return
        if not self._serving.acquire(blocking=False):
            _send(connection, {"error": "it serves another engine"})
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
                _send(connection, {"error": f"it cannot hold the engine's K/V: {error}"})
                return
            _send(connection, {"error": None})
            while True:
                request, blocks = _receive(connection, self._geometry.dtype)
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
        _send(connection, answer, parts)


def _send(connection: Connection, message: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    shapes = [list(t.shape) for t in tensors]
    connection.send_bytes(json.dumps({**message, "shapes": shapes}).encode())
    for tensor in tensors:
        raw = tensor.detach().to("cpu").contiguous().view(torch.uint8)
        connection.send_bytes(raw.numpy().tobytes())


def _receive(
    connection: Connection, dtype: torch.dtype = torch.uint8
) -> tuple[dict[str, Any], list[Tensor]]:
    message = json.loads(connection.recv_bytes())
    tensors = []
    for shape in message.pop("shapes"):
        raw = torch.frombuffer(bytearray(connection.recv_bytes()), dtype=torch.uint8)
        tensors.append(raw.view(dtype).view(shape))
    return message, tensors
