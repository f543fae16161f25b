"""What is refused: the status, the field, and OpenAI's form."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import HI, Served, serve

from prefillshare_train.data.rendering import RenderError
from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.server.config import ServerConfig
from prefillshare_train.serving.server.prompts import PromptMaker


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(FakeEngine(), max_tokens=100, max_n=4, max_body_bytes=20_000) as running:
        yield running


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("logit_bias", {"5": 100}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("tool_choice", "required"),
        ("parallel_tool_calls", False),
        ("modalities", ["audio"]),
        ("functions", []),
        ("best_of", 2),
        ("unheard_of", 1),
        ("temperature", "hot"),
        ("temperature", 2.5),
        ("top_p", 0),
        ("n", 0),
        ("n", True),
        ("n", 5),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 101),
        ("stop", ""),
        ("stop", [""]),
        ("seed", 2**63),
        ("messages", []),
        ("messages", "Hi"),
        ("model", None),
        ("end_session", True),
        ("stream_options", {"include_usage": True}),
        ("top_logprobs", 2),
        ("top_logprobs", 21),
        ("cache_salt", ""),
    ],
)
def test_a_field_that_cannot_be_served_is_named(served: Served, field: str, value: Any) -> None:
    assert refused(served.chat(**{field: value}))["param"].split(".")[0] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ".type"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user"}, ".content"),
        ({"role": "robot", "content": "x"}, ""),
        ({"role": "user", "content": "x", "tool_calls": []}, ".tool_calls"),
        ({"role": "assistant", "function_call": {"name": "x", "arguments": ""}}, ".function_call"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "[1]"}}]},
            ".tool_calls.0.function.arguments",
        ),
    ],
)
def test_a_message_that_cannot_be_rendered_is_named(
    served: Served, message: dict[str, Any], param: str
) -> None:
    found = refused(served.chat(messages=[*HI, message]))["param"]
    assert found.startswith("messages.1")
    assert found.endswith(param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [10**6]),
        ("prompt", [-1]),
        ("prompt", ["a"] * 5),
        ("messages", HI),
    ],
)
def test_plain_completions_refuse_too(served: Served, field: str, value: Any) -> None:
    param = refused(served.complete(**{field: value}))["param"]
    assert param == ("n" if value == ["a"] * 5 else field) or param.startswith(f"{field}.")


def test_neutral_values_and_openais_other_fields_are_taken(served: Served) -> None:
    neutral = {
        "response_format": {"type": "text"},
        "logit_bias": {},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "temperature": 1,
        "stop": None,
        "n": None,
        "top_k": -1,
    }
    assert served.chat(**neutral).status_code == 200
    assert served.engine.requests[-1].sampling.top_k == 0
    assert served.complete(best_of=1, echo=False, suffix="").status_code == 200


def test_parts_of_text_are_one_text(served: Served) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    served.chat()
    whole = served.engine.requests[-1].prompt_ids
    assert served.chat(messages=[{"role": "user", "content": parts}]).status_code == 200
    assert served.engine.requests[-1].prompt_ids == whole


def test_a_prompt_must_leave_room(served: Served) -> None:
    longest = served.engine.max_prompt_tokens
    assert served.complete(prompt=[1] * longest).status_code == 200
    assert served.engine.requests[-1].sampling.max_tokens == 1
    error = refused(served.complete(prompt=[1] * (longest + 1)))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = refused(served.complete(prompt=[1] * (longest - 10), max_tokens=12))
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    error = refused(served.chat(messages=[{"role": "user", "content": "x" * 600}]))
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_the_servers_own_prompt_limit() -> None:
    with serve(max_prompt_tokens=10) as served:
        assert served.complete(prompt=[1] * 10).status_code == 200
        assert "at most 10" in refused(served.complete(prompt=[1] * 11))["message"]


def test_a_template_that_refuses_is_the_clients_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise RenderError("roles must alternate")

    monkeypatch.setattr(type(served.engine.renderer), "text", refuse)
    error = refused(served.chat())
    assert error["param"] == "messages"
    assert "must alternate" in error["message"]


def test_two_lengths_that_differ(served: Served) -> None:
    assert served.chat(max_tokens=5, max_completion_tokens=5).status_code == 200
    error = refused(served.chat(max_tokens=5, max_completion_tokens=6))
    assert error["param"] == "max_tokens"


def test_prompts_wait_in_a_bounded_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(max_rendering=1) as served:
        entered, go = threading.Event(), threading.Event()
        kind = type(served.engine.renderer)
        encode = kind.encode

        def slow(*arguments: Any) -> Any:
            entered.set()
            go.wait(10)
            return encode(*arguments)

        monkeypatch.setattr(kind, "encode", slow)
        with ThreadPoolExecutor() as threads:
            first = threads.submit(served.chat)
            assert entered.wait(10)
            answer = served.chat()
            go.set()
            assert refused(answer, 429)["code"] == "queue_full"
            assert answer.headers["retry-after"] == "1"
            assert first.result().status_code == 200
        assert served.chat().status_code == 200


def test_unknown_paths_and_methods(served: Served) -> None:
    assert refused(served.http.get("/v1/other"), 404)["type"] == "not_found_error"
    answer = served.http.get("/v1/chat/completions")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_stopped_engine_is_503(served: Served) -> None:
    served.engine.accepting = False
    try:
        for answer in (served.chat(), served.chat(stream=True)):
            assert refused(answer, 503)["code"] == "stopping"
    finally:
        served.engine.accepting = True


def test_the_key_guards_all_but_page_and_health() -> None:
    with serve(api_key="sécret") as served:
        for path in ("/v1/models", "/metrics", "/stats"):
            assert refused(served.http.get(path), 401)["code"] == "invalid_api_key"
        assert refused(served.chat(), 401)["type"] == "authentication_error"
        for path in ("/", "/page/chat.js", "/health", "/ready", "/openapi.json"):
            assert served.http.get(path).status_code == 200
        for given in ("Bearer sécre", "Bearer sécrett", "Basic sécret", "sécret"):
            headers = {"Authorization": given.encode()}
            assert served.http.get("/v1/models", headers=headers).status_code == 401
        headers = {"Authorization": "bearer sécret".encode()}
        assert served.http.get("/v1/models", headers=headers).status_code == 200


def test_without_a_key_only_loopback_names_are_answered(served: Served) -> None:
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert served.http.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::1", ""):
        refused(served.http.get("/health", headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ServingError, match="API key"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, api_key="k").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert ServerConfig(host=host).api_key is None


@pytest.mark.parametrize(
    "options", [{"max_n": 0}, {"port": 70000}, {"body_timeout_s": 0}, {"api_key": " "}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match=next(iter(options)).replace("api_key", "API key")):
        ServerConfig(**options)


def test_too_many_prompts_are_refused_before_any_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(FakeEngine(), max_n=4) as running:
        made: list[object] = []
        monkeypatch.setattr(PromptMaker, "_completion", lambda _, body: made.append(body))
        body = {"model": "math", "prompt": ["a"] * 1000}
        assert refused(running.http.post("/v1/completions", json=body))["param"] == "n"
        assert made == []
