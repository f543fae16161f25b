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
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.kv_storage import KVGeometry, KVStorage
from prefillshare_train.serving.lane import Piece, run_pieces
from prefillshare_train.serving.workers import PrefillReport, Report

logger = logging.getLogger(__name__)


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
        self._closing = False
        try:
            self._connection: Connection = Client(parse_address(address), authkey=key)
            shape = {"blocks": storage.blocks, "block_tokens": storage.block_tokens}
            _send(self._connection, {"hello": asdict(hello), **shape})
            answer, _ = _receive(self._connection)
        except (OSError, EOFError) as error:
            raise ServingError(
                f"no prefill worker answers at {address} ({type(error).__name__}: {error}). Start "
                "one there with `prefillshare prefill-worker`, with the same key"
            ) from error
        except Exception as error:  # AuthenticationError is not an OSError
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
        batch = [[list(p.ids), list(p.past_slots), list(p.write_slots)] for p in pieces]
        blocks = [storage.memory[:, :, block] for block in stale]
        _send(self._connection, {"batch": batch, "stale": stale}, blocks)

    def close(self) -> None:
        """Hang up; the worker waits for its next engine."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._connection.close()
        self._thread.join(10)

    def _listen(self) -> None:
        while True:
            try:
                answer, tensors = _receive(self._connection, self._storage.geometry.dtype)
            except (EOFError, OSError, ValueError, TypeError) as error:
                if not self._closing:
                    reason = f"the connection to it broke ({type(error).__name__}: {error})"
                    self._report(PrefillReport(self._number, 0.0, reason))
                return
            start = time.perf_counter()
            if answer["error"] is None:
                self._place(tensors)
            placed = time.perf_counter() - start
            hop = answer["packed_s"] + placed
            self._report(PrefillReport(self._number, answer["seconds"], answer["error"], hop))

    def _place(self, tensors: Sequence[Tensor]) -> None:
        """Put the K/V that came back, (layers, 2, tokens, H_kv, D) a piece, where they belong."""
        flat = self._storage.memory.flatten(2, 3)
        for piece, content in zip(self._pieces, tensors, strict=True):
            slots = torch.tensor(list(piece.write_slots), device=flat.device)
            flat[:, :, slots] = content.to(flat.device)


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
        self._geometry = KVGeometry.of(model)
        self._hello = Hello.of(fingerprint, self._geometry)
        self._listener = Listener(address, authkey=key)
        self.address: tuple[str, int] = self._listener.address

    def serve_forever(self) -> None:
        """Serve until `close`."""
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            except Exception as error:  # a caller with a wrong key must not end the worker
                logger.warning("a caller was turned away: %s", error)
                continue
            with connection, contextlib.suppress(EOFError, ConnectionError):
                self._serve(connection)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        hello, _ = _receive(connection)
        theirs = Hello(**hello["hello"])
        if theirs != self._hello:
            _send(connection, {"error": f"it serves {self._hello}, the engine {theirs}"})
            return
        storage = KVStorage(
            self._geometry, hello["blocks"], hello["block_tokens"], device=self._model.device
        )
        _send(connection, {"error": None})
        while True:
            request, blocks = _receive(connection, self._geometry.dtype)
            for block, content in zip(request["stale"], blocks, strict=True):
                storage.put_back(block, content)
            pieces = [Piece(*piece) for piece in request["batch"]]
            start = time.perf_counter()
            try:
                run_pieces(self._model, storage, pieces, stop_early=True)
            except Exception as error:
                _send(
                    connection,
                    {"error": f"{type(error).__name__}: {error}", "seconds": 0.0, "packed_s": 0.0},
                )
                return
            ran = time.perf_counter()
            flat = storage.memory.flatten(2, 3)
            parts = [flat[:, :, torch.tensor(list(p.write_slots))] for p in pieces]
            packed = time.perf_counter() - ran
            _send(connection, {"error": None, "seconds": ran - start, "packed_s": packed}, parts)


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
