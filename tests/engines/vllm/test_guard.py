"""The decoders' guard, in front of an application that takes everything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from prefillshare_train.engines.vllm.guard import DecoderGuard, StoreGuard

TICKET = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}
WHOLE = {"model": "ada", "prompt": [1, 2, 3], "kv_transfer_params": TICKET}


class Taken:
    """The application behind the guard: what reached it, and its answer."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.later: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message.get("body", b""))
        self.later.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def call(
    body: Any,
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    guard: type[StoreGuard] = DecoderGuard,
    chunk: int | None = None,
    root: str = "",
    kind: str = "http",
) -> tuple[int, dict[str, Any], Taken]:
    """Status, answer, and the application."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = chunk or max(1, len(raw))
    parts = [raw[i : i + size] for i in range(0, len(raw), size)] or [b""]
    waiting = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ]
    waiting.append({"type": "http.disconnect"})
    sent: list[dict[str, Any]] = []
    app = Taken()

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": root + path, "root_path": root}
    asyncio.run(guard(app)(scope, receive, send))
    if kind == "websocket":
        return sent[0]["code"], sent[0], app
    return sent[0]["status"], json.loads(sent[1]["body"]), app


def test_a_request_with_a_prefill_passes_whole() -> None:
    status, _, app = call(WHOLE)
    assert status == 200
    assert json.loads(app.bodies[0]) == WHOLE
    assert app.later == [{"type": "http.disconnect"}]  # that the client has gone is still seen


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_body_in_chunks_passes_whole_or_is_refused(chunk: int) -> None:
    status, _, app = call(WHOLE, chunk=chunk)
    assert status == 200
    assert json.loads(app.bodies[0]) == WHOLE
    assert call({"model": "ada", "prompt": "x"}, chunk=chunk)[0] == 409


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        [],
        "yes",
        TICKET | {"do_remote_prefill": False},
        TICKET | {"do_remote_prefill": "true"},
        TICKET | {"do_remote_decode": True},
        {"do_remote_decode": True, "do_remote_prefill": False},
        *({k: v for k, v in TICKET.items() if k != missing} for missing in list(TICKET)[2:7]),
        TICKET | {"remote_block_ids": []},
        TICKET | {"remote_block_ids": None},
    ],
)
def test_one_that_the_decoder_would_prefill_is_refused(params: Any) -> None:
    status, answer, app = call({**WHOLE, "kv_transfer_params": params})
    assert status == 409
    assert app.bodies == []
    error = answer["error"]
    assert error["message"]
    assert error["type"] == "prefillshare_refused"
    assert error["param"].startswith("kv_transfer_params")
    assert error["code"] == 409


def test_the_message_says_what_to_do() -> None:
    message = call({"model": "ada", "prompt": "x"})[1]["error"]["message"]
    assert "its own weights" in message
    assert "router" in message


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate"],
)
def test_every_generating_route_is_guarded(path: str) -> None:
    assert call({"messages": []}, path=path)[0] == 409
    assert call({"messages": [], "kv_transfer_params": TICKET}, path=path)[0] == 200


@pytest.mark.parametrize("guard", [DecoderGuard, StoreGuard])
@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/v1/chat/completions/batch",
        "/v1/embeddings",
        "/pooling",
        "/v1/audio/transcriptions",
        "/generative_scoring",
        "/cohere/v2/chat",
        "/v1/completions/",
        "/V1/completions",
        "//v1/completions",
        "/something/new",
    ],
)
def test_a_route_that_is_not_known_is_refused(guard: type[StoreGuard], path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        status, answer, app = call(WHOLE, path=path, method=method, guard=guard)
        assert status == 409
        assert path in answer["error"]["message"]
        assert app.bodies == []


@pytest.mark.parametrize(
    ("path", "method"),
    [("/health", "GET"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/tokenize", "POST")],
)
def test_what_generates_nothing_passes(path: str, method: str) -> None:
    assert call({}, path=path, method=method)[0] == 200


@pytest.mark.parametrize("guard", [DecoderGuard, StoreGuard])
@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"sampling_params": {"n": 2}}, "n"),
        ({"sampling_params": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ],
)
def test_what_one_prefill_cannot_answer_is_refused(
    guard: type[StoreGuard], values: dict[str, Any], param: str
) -> None:
    status, answer, _ = call(WHOLE | values, guard=guard)
    assert status == 409
    assert answer["error"]["param"] == param


def test_the_store_route_needs_no_ticket() -> None:
    for model in ("base", "lora-ada"):
        assert call({"model": model, "prompt": "x", "n": 1}, guard=StoreGuard)[0] == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": "ada"', b"nul"]
)
def test_what_is_no_json_is_refused_as_such(body: bytes) -> None:
    status, answer, app = call(body)
    assert status == 400
    assert "no JSON" in answer["error"]["message"]
    assert app.bodies == []


def test_json_that_is_no_object_is_refused() -> None:
    assert call([WHOLE])[0] == 409
    assert call(3)[0] == 409


def test_the_root_path_is_left_out_of_the_route() -> None:
    assert call({"prompt": "x"}, root="/api")[0] == 409
    assert call(WHOLE, root="/api")[0] == 200
    assert call({}, path="/tokenize", root="/api")[0] == 200


def test_the_last_of_two_equal_keys_counts_as_for_the_server_behind() -> None:
    twice = json.dumps(WHOLE)[:-1] + ', "kv_transfer_params": null}'
    assert call(twice.encode())[0] == 409


def test_a_client_that_goes_before_its_body_is_read_is_let_go() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    app = Taken()
    asyncio.run(DecoderGuard(app)(scope, receive, send))
    assert (sent, app.bodies) == ([], [])


def test_websockets_are_closed() -> None:
    code, message, app = call({}, path="/v1/realtime", kind="websocket")
    assert (code, message["type"], app.bodies) == (1008, "websocket.close", [])


def test_what_is_neither_http_nor_websocket_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(DecoderGuard(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
