"""Messages between an engine and its remote prefill workers: JSON, and tensors as raw bytes.

No wait is without an end: a peer that stops reading or writing within a message is given up, and so
is one whose machine is gone.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch
from torch import Tensor

HANDSHAKE_S = 30.0
"""For a connection to be made, and for a stranger to show the key."""
_STALL_S = 30.0  # without progress within a message


def connect(address: tuple[str, int], key: bytes) -> Connection:
    """As `multiprocessing.connection.Client`, which waits for ever."""
    with socket.create_connection(address, timeout=HANDSHAKE_S) as reached:
        reached.setblocking(True)
        connection = Connection(reached.detach())
    try:
        bound(connection)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except BaseException:
        connection.close()
        raise
    return connection


def bound(connection: Connection) -> None:
    """Let a peer that stalls within a message, or whose machine is gone, be an `OSError`."""
    stall = struct.pack("ll", int(_STALL_S), int(_STALL_S % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if option := getattr(socket, name, None):  # macOS has other names
                same.setsockopt(socket.IPPROTO_TCP, option, seconds)


def send(connection: Connection, message: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Send JSON values, and tensors of any dtype and shape.

    Raises:
        OSError: the peer is gone, or does not read.
    """
    shapes = [list(t.shape) for t in tensors]
    connection.send_bytes(json.dumps({**message, "shapes": shapes}).encode())
    for tensor in tensors:
        raw = tensor.detach().to("cpu").contiguous().view(torch.uint8)
        connection.send_bytes(raw.numpy().tobytes())


def receive(
    connection: Connection, dtype: torch.dtype = torch.uint8
) -> tuple[dict[str, Any], list[Tensor]]:
    """What `send` sent, its tensors as `dtype` on the CPU. It must have begun to come: see `poll`.

    Raises:
        EOFError, OSError: the peer is gone, or does not go on.
        ValueError: it is no JSON.
    """
    message = json.loads(connection.recv_bytes())
    tensors = []
    for shape in message.pop("shapes"):
        raw = torch.frombuffer(bytearray(connection.recv_bytes()), dtype=torch.uint8)
        tensors.append(raw.view(dtype).view(shape))
    return message, tensors
