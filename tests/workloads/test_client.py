"""Clients: what they time, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from tests.workloads.fakes import FakeEngine

from prefillshare_train.workloads.client import Call, InProcessClient, OverloadedError, Reply
from prefillshare_train.workloads.http_client import Api, HttpClient

CALL = Call("s", "a", (1, 2, 3, 4), 5)


def ask(client: Any, call: Call = CALL) -> Reply:
    async def run() -> Reply:
        return await client.generate(call)

    return asyncio.run(run())


def test_in_process_times_and_tokens() -> None:
    engine = FakeEngine(first_s=0.05, each_s=0.02)
    reply = ask(InProcessClient(engine))
    assert reply.token_ids == (200, 201, 202, 203, 204)
    assert reply.text == "xxxxx"
    assert reply.error is None
    assert reply.completion_tokens == 5
    assert reply.ttft_s is not None
    assert reply.tpot_s is not None
    assert reply.ttft_s >= 0.05
    assert reply.tpot_s >= 0.02
    assert reply.total_s == pytest.approx(reply.ttft_s + 4 * reply.tpot_s)
    assert (reply.prompt_tokens, reply.cached_tokens, reply.base_tokens) == (4, 1, 3)
    [request] = engine.requests
    assert request.sampling.ignore_eos
    assert request.sampling.max_tokens == 5
    assert (request.session, request.end_session) == ("s", False)


def test_in_process_failures_become_errors() -> None:
    assert ask(InProcessClient(FakeEngine(fail="a"))).error == "it broke"
    refused = ask(InProcessClient(FakeEngine()), Call("s", "z", (1,), 5))
    assert refused.error is not None
    assert "no decoder 'z'" in refused.error


def test_in_process_queue_full_is_overload() -> None:
    with pytest.raises(OverloadedError) as caught:
        ask(InProcessClient(FakeEngine(refuse=1)))
    assert caught.value.retry_after_s == 0.01


def test_in_process_cancelling_ends_the_request() -> None:
    engine = FakeEngine(silent="a")

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await InProcessClient(engine).generate(CALL)

    asyncio.run(run())
    assert engine.cancelled == [engine.requests[0].request_id]


def test_in_process_messages_are_rendered_by_the_engine() -> None:
    engine = FakeEngine()
    messages = ({"role": "user", "content": "four"}, {"role": "user", "content": "seven77"})
    ask(InProcessClient(engine), Call("s", "a", (), 1, messages, last=True))
    assert engine.requests[0].prompt_ids == (4, 7)
    assert engine.requests[0].end_session


def test_in_process_headers_are_those_of_the_prompt() -> None:
    engine = FakeEngine(header=(91, 92))
    messages = ({"role": "user", "content": "four"},)
    ask(InProcessClient(engine), Call("s", "a", (), 1, messages))
    for prompt in ((1, 2, 91, 92), (1, 2, 91), (92,)):
        ask(InProcessClient(engine), Call("s", "a", prompt, 1))
    assert engine.requests[0].prompt_ids == (4, 91, 92)
    assert [request.header_length for request in engine.requests] == [2, 2, 0, 0]


def test_in_process_messages_that_the_template_refuses_are_an_error_of_the_call() -> None:
    reply = ask(
        InProcessClient(FakeEngine()), Call("s", "a", (), 1, ({"role": "user", "content": ""},))
    )
    assert reply.error == "the template refuses the messages"


def stream(*chunks: dict[str, Any]) -> httpx.Response:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.Response(200, text=": comment\n\n" + "".join(lines) + "data: [DONE]\n\n")


def http(answer: Callable[[httpx.Request], httpx.Response], **options: Any) -> HttpClient:
    return HttpClient("http://here", transport=httpx.MockTransport(answer), **options)


USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def test_http_completions_send_token_ids_and_read_the_usage() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return stream(
            {"choices": [{"text": "Hel"}]},
            {"choices": [{"text": "lo"}]},
            {"choices": [{"text": "", "finish_reason": "length"}]},
            {"choices": [], "usage": USAGE},
        )

    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    reply = ask(http(answer, api_key="k", encode=encode))
    body = json.loads(seen[0].content)
    assert seen[0].url.path == "/v1/completions"
    assert seen[0].headers["Authorization"] == "Bearer k"
    assert body["prompt"] == [1, 2, 3, 4]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("a", 5, 0)
    assert (body["ignore_eos"], body["session_id"], body["end_session"]) == (True, "s", False)
    assert body["stream_options"] == {"include_usage": True}
    assert reply.text == "Hello"
    assert reply.token_ids == tuple(map(ord, "Hello"))
    assert reply.error is None
    assert (reply.completion_tokens, reply.prompt_tokens, reply.cached_tokens) == (5, 4, 3)
    assert reply.ttft_s is not None
    assert 0 < reply.ttft_s <= reply.total_s


def test_http_chat_sends_text_and_the_role_chunk_is_no_token() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/chat/completions"
        bodies.append(json.loads(request.content))
        return stream(
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "Hi"}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        )

    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    reply = ask(http(answer, api="chat", decode=decode, extensions=False))
    assert reply.completion_tokens == 1
    assert bodies[0]["messages"] == [{"role": "user", "content": "1 2 3 4"}]
    assert not {"ignore_eos", "session_id", "end_session"} & set(bodies[0])
    messages = ({"role": "user", "content": "hello"},)
    ask(http(answer), Call("s", "a", (), 1, messages))
    assert bodies[1]["messages"] == list(messages)


class Slow(httpx.AsyncByteStream):
    """Chunks, and a pause in seconds before each."""

    def __init__(self, *chunks: tuple[float, dict[str, Any]]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for pause, chunk in self._chunks:
            await asyncio.sleep(pause)
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield b"data: [DONE]\n\n"


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_http_tokens_without_text_take_their_time(api: Api) -> None:
    """Special tokens, which servers give no text, under `ignore_eos`."""

    def chunk(text: str, **more: Any) -> dict[str, Any]:
        choice = {"text": text} if api == "completions" else {"delta": {"content": text}}
        return {"choices": [{**choice, "finish_reason": None, **more}]}

    def ask_for(*chunks: tuple[float, dict[str, Any]]) -> Reply:
        end = (0.0, {"choices": [], "usage": USAGE})
        answer = httpx.Response(200, stream=Slow(*chunks, end))
        return ask(http(lambda _: answer, api=api, decode=str))

    role = (0.0, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    first = [role] if api == "chat" else []
    ended = chunk("", finish_reason="length")
    late = ask_for(*first, (0.05, chunk("a")), (0.2, ended))
    assert late.ttft_s is not None
    assert 0.05 <= late.ttft_s < 0.2 < late.total_s
    silent = ask_for(*first, (0.1, chunk("", finish_reason="length")))
    assert silent.error is None
    assert silent.ttft_s is not None
    assert min(silent.ttft_s, silent.total_s) >= 0.1


def test_http_extensions_are_left_out_where_a_server_refuses_them() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return stream({"choices": [{"text": "H", "finish_reason": "stop"}]})

    ask(http(answer, cache_salt="this load's"))
    ask(http(answer, cache_salt="this load's", extensions=False))
    names = {"ignore_eos", "session_id", "end_session", "cache_salt"}
    assert bodies[0]["cache_salt"] == "this load's"
    assert [names & set(body) for body in bodies] == [names, set()]


def test_http_a_stream_that_breaks_off_is_an_error() -> None:
    chunk = json.dumps({"choices": [{"text": "H", "finish_reason": None}]})

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=f"data: {chunk}\n\n")

    error = ask(http(answer)).error
    assert error == "the stream broke off after 1 tokens: no finish reason, no [DONE]"


@pytest.mark.parametrize("extensions", [True, False])
def test_http_a_response_that_ends_early_is_an_error_where_it_must_not(extensions: bool) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        ended = {"choices": [{"text": "H", "finish_reason": "stop"}]}
        return stream(ended, {"choices": [], "usage": {**USAGE, "completion_tokens": 4}})

    error = ask(http(answer, extensions=extensions)).error
    if extensions:
        assert error is not None
        assert "the response has 4 of 5 tokens: the server does not know ignore_eos" in error
    else:
        assert error is None


@pytest.mark.parametrize("status", [429, 503])
def test_http_overload_asks_for_patience(status: int) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers={"Retry-After": "7"})

    with pytest.raises(OverloadedError) as caught:
        ask(http(answer))
    assert caught.value.retry_after_s == 7


def test_http_failures_become_errors() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"error": {"message": "no such model"}})

    def vanish(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody is there")

    def broken(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="data: {not json\n\n")

    def fails_late(request: httpx.Request) -> httpx.Response:
        return stream({"choices": [{"text": "H"}]}, {"error": {"message": "out of memory"}})

    def empty(request: httpx.Request) -> httpx.Response:
        return stream()

    found = [ask(http(answer)).error for answer in (refuse, vanish, broken, fails_late, empty)]
    for text, error in zip(
        ("no such model", "nobody is there", "JSON", "out of memory", "empty"), found, strict=True
    ):
        assert error is not None
        assert text in error
