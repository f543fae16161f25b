"""The official client against the router: our server's whole surface, answered by instances."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from tests.engines.vllm.router.deployment import Deployment, deploy
from tests.serving.server.fake_engine import renderer

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 2?"}]
ADD: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object"}},
}
RENDERER = renderer()


def script(body: dict[str, Any]) -> str:
    if "<tools>" in RENDERER.decode(body["prompt"]):
        return 'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    return "It is 4. END"


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    with deploy(script=script, server={"api_key": "secret"}) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Deployment) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{running.port}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=20) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["math", "code"]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="code", messages=QUESTION, stop=[" END"], n=2)
    assert [choice.message.content for choice in answer.choices] == ["It is 4."] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERER.prompt_ids(QUESTION))  # type: ignore[arg-type]
    assert answer.usage.completion_tokens == 2 * len("It is 4.")


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="math",
            messages=QUESTION,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "It is"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "math", "messages": QUESTION, "tools": [ADD]}
    if stream:
        with client.chat.completions.stream(**options) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Adding."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2})


@pytest.mark.parametrize("count", [0, 2])
def test_logprobs(client: openai.OpenAI, count: int) -> None:
    answer = client.chat.completions.create(
        model="math", messages=QUESTION, logprobs=True, top_logprobs=count
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == "It is 4. END"
    assert {entry.logprob for entry in entries} == {-0.5}
    assert {len(entry.top_logprobs) for entry in entries} == {count}


def test_plain_completions(running: Deployment, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="math", prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["It is"] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list("It is")
    prompts = sorted(call["prompt"] for call in running.pools["math"][0].calls[-2:])
    assert prompts == sorted(RENDERER.encode(["a", "b"]))


def test_errors(client: openai.OpenAI, running: Deployment) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    running.pools["math"][0].faults.append("break")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="math", messages=QUESTION)
    running.pools["math"][0].faults.append("break")
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="math", messages=QUESTION, stream=True))
