"""Clients that are broken, slow, greedy or gone: a 4xx or a close, and the server lives."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import Served, serve, wait_for

from prefillshare_train.serving.server.requests import ChatRequest, CompletionRequest, Strict

PATH = "/v1/chat/completions"
BODY = json.dumps({"model": "math", "messages": [{"role": "user", "content": "Hi"}]}).encode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = {"header_timeout_s": 0.4, "body_timeout_s": 0.4, "write_timeout_s": 0.4}
    with serve(FakeEngine(), max_body_bytes=100_000, **options) as running:
        yield running
        assert running.lives()


def head(length: int | str, *more: str) -> bytes:
    lines = [
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def connect(served: Served, receive_buffer: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(10)
    client.connect(("127.0.0.1", served.port))
    return client


def talk(served: Served, data: bytes) -> bytes:
    """All that comes back until the server closes."""
    with connect(served) as client:
        # The server may close before it has all.
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            received += part
    return received


def status(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        BODY.replace(b"Hi", b"\xc3\x28"),
        BODY.replace(b'"Hi"', b"NaN"),
        BODY.replace(b'"Hi"', b"1" * 5000),
        BODY[:-1] + b', "temperature": NaN}',
        BODY[:-1] + b', "temperature": 1e999}',
        BODY[:-1] + b', "max_tokens": 1e30}',
        BODY[:-1] + b', "\\ud800": 1}',
        BODY[:-1] + b', "tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        BODY[:-1]
        + b', "tools": [{"type": "function", "function": {"name": "x", "parameters": '
        + b'{"a":' * 500
        + b"1"
        + b"}" * 500
        + b"}}]}",
        BODY[:-1]
        + b', "tools": [{"type": "function", "function": {"name": "x", "parameters": '
        + b'{"a": "\\udfff"}}}]}',
        BODY.replace(b"math", b"\\ud800"),
        BODY.replace(b"math", b"\\u0000"),
    ],
    ids=range(18),
)
def test_bad_bodies(served: Served, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = served.http.post(PATH, content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "\xff"])
def test_other_content_types_are_no_json(served: Served, kind: str) -> None:
    """A form on another site could otherwise send one without asking first."""
    headers = {b"Content-Type": kind.encode("latin-1")}
    assert served.http.post(PATH, content=BODY, headers=headers).status_code in (400, 415, 422)


USER = {"role": "user", "content": "Hi"}
MANY = {f"field{number}": 1 for number in range(20_000)}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [None] * 20_000}),
        (CompletionRequest, {"prompt": ["a", 1] * 20_000}),
        (CompletionRequest, {"prompt": [[None] * 20_000] * 2}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * 20_000}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [0] * 20_000}]}),
        (ChatRequest, {"messages": [0] * 20_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": 0, "a": 1, "b": 2}] * 4096}),
        (ChatRequest, {"messages": [USER], "tools": [0] * 20_000}),
        (ChatRequest, {"messages": [USER], "stop": [0] * 20_000, "stop_token_ids": [""] * 20_000}),
        (ChatRequest, {"messages": [USER], **MANY}),
        (ChatRequest, {"messages": [USER | MANY]}),
    ],
)
def test_errors_of_long_bodies_are_not_all_listed(kind: type[Strict], fields: Any) -> None:
    """Megabytes of them would hold up all other requests."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "math", **fields})
    assert caught.value.error_count() <= 4


def test_too_many_fields_are_told(served: Served) -> None:
    body = json.dumps({**json.loads(BODY), **{f"f{number}": 1 for number in range(100)}}).encode()
    answer = talk(served, head(len(body), "Connection: close") + body)
    assert status(answer) == 400
    assert b"102 fields were given" in answer


def test_a_body_that_is_too_long(served: Served) -> None:
    received = talk(served, head(10**12))
    assert status(received) == 413
    assert b"connection: close" in received.lower()
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    received = talk(served, start + chunk * 10)
    assert not received or status(received) == 413
    assert served.lives()


def test_a_body_that_does_not_come(served: Served) -> None:
    started = time.monotonic()
    received = talk(served, head(len(BODY)) + BODY[:10])
    assert status(received) == 408
    assert time.monotonic() - started < 5


def test_a_body_that_drips(served: Served) -> None:
    with connect(served) as client:
        client.sendall(head(len(BODY)))
        received = b""
        try:
            for byte in BODY[:40]:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
            received = read_all(client)
        except OSError:
            return
    assert status(received) == 408


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHo"])
def test_headers_that_do_not_come(served: Served, start: bytes) -> None:
    started = time.monotonic()
    assert talk(served, start) == b""
    assert 0.3 < time.monotonic() - started < 5


def test_a_second_request_of_a_connection_has_the_deadline_too(served: Served) -> None:
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        client.sendall(b"GET /hea")
        started = time.monotonic()
        read_all(client)
        assert time.monotonic() - started < 5


def test_an_idle_connection_is_kept_for_its_next_request(served: Served) -> None:
    with connect(served) as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(65536)
            time.sleep(0.6)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 900_000,
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\r\n\r\nnonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        head("10, 20"),
        head(5, "Transfer-Encoding: chunked") + b"zz\r\n\r\n",
    ],
    ids=range(8),
)
def test_what_is_no_http(served: Served, data: bytes) -> None:
    received = talk(served, data)
    assert not received or 400 <= status(received) < 500


def test_a_client_that_goes_while_its_answer_is_made() -> None:
    with serve(FakeEngine("x" * 400, delay_s=0.05)) as served:
        with connect(served) as client:
            client.sendall(head(len(BODY)) + BODY)
            wait_for(lambda: served.engine.live == 1)
        started = time.monotonic()
        wait_for(lambda: served.engine.live == 0)
        assert time.monotonic() - started < 1
        assert len(served.engine.cancelled) == 1
        assert "prefillshare_clients_gone_total 1.0" in served.http.get("/metrics").text


def test_a_client_that_goes_while_it_waits_in_a_stream() -> None:
    body = BODY[:-1] + b', "stream": true, "n": 2}'
    with serve(FakeEngine("x" * 400, delay_s=0.3)) as served:
        with connect(served) as client:
            client.sendall(head(len(body)) + body)
            wait_for(lambda: served.engine.live == 2)
        wait_for(lambda: served.engine.live == 0, 2)
        assert len(served.engine.cancelled) == 2


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    body = BODY[:-1] + b', "stream": true, "logprobs": true, "top_logprobs": 20}'
    engine = FakeEngine("x" * 400, delay_s=0.01)
    with serve(engine, send_buffer=8192, write_timeout_s=0.3) as served:
        with connect(served, receive_buffer=4096) as client:
            client.sendall(head(len(body)) + body)
            wait_for(lambda: engine.cancelled, 30)
        engine.delay_s = 0
        assert served.lives()


def test_no_more_connections_than_allowed() -> None:
    with serve(FakeEngine(), max_connections=3) as served:
        idle = [connect(served) for _ in range(3)]
        try:
            wait_for(lambda: len(served.server.server_state.connections) >= 3)
            assert served.http.get("/health").status_code == 503
        finally:
            for client in idle:
                client.close()
        wait_for(lambda: served.http.get("/health").status_code == 200)
