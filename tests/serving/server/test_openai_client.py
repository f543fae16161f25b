"""The official client as acceptance: what it asks and what it understands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import Served, serve, wait_for

from prefillshare_train.serving.api import GenerationRequest

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 2?"}]
ADD: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


def script(request: GenerationRequest) -> str:
    prompt = PROMPTS.renderer.decode(request.prompt_ids)
    if "fail" in prompt:
        raise RuntimeError("no luck")
    if "<tools>" in prompt and "<tool_response>" not in prompt:
        call = 'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}'
        return call if "unclosed" in prompt else call + "\n</tool_call>"
    if "long" in prompt:
        return "x" * 300
    return "It is 4. END"


PROMPTS = FakeEngine()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(
        FakeEngine(script, delay_s=0.002, max_prompt_tokens=2047), api_key="secret"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{served.port}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=20) as made:
        yield made


def test_models_are_the_decoders(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["math", "code"]
    assert client.models.retrieve("code").id == "code"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_and_the_options_that_reach_the_engine(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="code",
        messages=QUESTION,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=[" END"],
        max_completion_tokens=50,
        user="me",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "session_id": "s",
            "end_session": True,
            "cache_salt": "mine",
            "stop_token_ids": [9],
            "ignore_eos": True,
        },
    )
    assert answer.choices[0].message.content == "It is 4."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    request = served.engine.requests[-1]
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert answer.usage.completion_tokens == len("It is 4.")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    sampling = request.sampling
    assert (request.decoder, request.session, request.end_session) == ("code", "s", True)
    assert request.cache_salt == "mine"
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 7)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.1)
    assert (sampling.stop, sampling.max_tokens) == ((" END",), 50)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((9,), True)


def test_defaults_are_openais(served: Served, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="math", messages=QUESTION)
    sampling = served.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 1.0, None)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.0, 1.0)
    assert sampling.logprobs is None
    assert not sampling.ignore_eos
    client.completions.create(model="math", prompt="a")
    assert served.engine.requests[-1].sampling.max_tokens == 16


def test_only_the_last_response_ends_the_session(served: Served, client: openai.OpenAI) -> None:
    client.completions.create(
        model="math", prompt=["a", "b"], n=2, extra_body={"session_id": "s", "end_session": True}
    )
    requests = sorted(served.engine.requests[-4:], key=lambda request: request.request_id)
    assert [request.end_session for request in requests] == [False, False, False, True]
    assert {request.session for request in requests} == {"s"}


def test_the_prompt_is_the_one_that_was_trained(served: Served, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="math", messages=QUESTION)
    request = served.engine.requests[-1]
    renderer = served.engine.renderer
    assert list(request.prompt_ids) == renderer.prompt_ids(QUESTION)
    header = renderer.decode(request.prompt_ids[-request.header_length :])
    assert header == "<|im_start|>assistant\n"


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="math", messages=QUESTION)
    second = client.chat.completions.create(
        model="code",
        messages=[*QUESTION, {"role": "assistant", "content": "It is 4. END"}, *QUESTION],
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 < cached < second.usage.prompt_tokens
    more = second.usage.model_extra
    assert more is not None
    assert more["prefillshare"]["prefilled_tokens"] + cached + 1 == second.usage.prompt_tokens
    assert more["prefillshare"]["ttft_s"] > 0


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="math", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "It is 4. END"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="math", messages=QUESTION, tools=[ADD])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Adding."
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2})
    messages = [
        *QUESTION,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "4"},
    ]
    last = client.chat.completions.create(model="math", messages=messages, tools=[ADD])  # type: ignore[arg-type]
    assert last.choices[0].message.content == "It is 4. END"
    assert last.choices[0].finish_reason == "stop"


def test_a_call_goes_back_into_the_prompt_as_it_was_generated(
    served: Served, client: openai.OpenAI
) -> None:
    """Or the session's next turn would not find its blocks."""
    answer = client.chat.completions.create(model="math", messages=QUESTION, tools=[ADD])
    first = served.engine.requests[-1]
    message = answer.choices[0].message.model_dump()
    client.chat.completions.create(
        model="math",
        messages=[*QUESTION, message, {"role": "tool", "content": "4"}],  # type: ignore[list-item]
        tools=[ADD],
    )
    decode = served.engine.renderer.decode
    second = decode(served.engine.requests[-1].prompt_ids)
    assert second.startswith(decode(first.prompt_ids) + script(first))


def test_streamed_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="math", messages=QUESTION, tools=[ADD]) as stream:
        whole = stream.get_final_completion()
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Adding."
    assert choice.message.tool_calls is not None
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 2}
    assert choice.message.tool_calls[0].id.startswith("call_")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_not_closed_is_one_where_it_is_whole(
    client: openai.OpenAI, stream: bool
) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "unclosed"}]
    options: dict[str, Any] = {"model": "math", "messages": messages, "tools": [ADD]}
    if stream:
        with client.chat.completions.stream(**options) as running:
            choice: Any = running.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]


def test_tokens_whose_text_is_held_back_tell_their_logprobs(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="math", messages=QUESTION, tools=[ADD], logprobs=True, stream=True
    )
    tokens = [
        entry.token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert "".join(tokens).startswith("Adding.\n<tool_call>")
    assert "".join(tokens).endswith("</tool_call>")


def test_tool_choice_none_reads_no_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="math", messages=QUESTION, tools=[ADD], tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert "<tool_call>" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_draw_with_seeds_of_their_own(
    served: Served, client: openai.OpenAI, stream: bool
) -> None:
    before = len(served.engine.requests)
    if stream:
        chunks = client.chat.completions.create(
            model="math", messages=QUESTION, n=3, seed=10, stream=True
        )
        ends = {c.choices[0].index for c in chunks if c.choices and c.choices[0].finish_reason}
        assert ends == {0, 1, 2}
    else:
        answer = client.chat.completions.create(model="math", messages=QUESTION, n=3, seed=10)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3 * len("It is 4. END")
        assert answer.usage.prompt_tokens == len(served.engine.requests[-1].prompt_ids)
    assert sorted(r.sampling.seed for r in served.engine.requests[before:]) == [10, 11, 12]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        chunks = client.chat.completions.create(
            model="math", messages=QUESTION, logprobs=True, top_logprobs=2, stream=True
        )
        entries = [
            entry
            for chunk in chunks
            if chunk.choices and chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content or []
        ]
    else:
        answer = client.chat.completions.create(
            model="math", messages=QUESTION, logprobs=True, top_logprobs=2
        )
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == "It is 4. END"
    assert b"".join(bytes(entry.bytes or []) for entry in entries) == b"It is 4. END"
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert {entry.logprob for entry in entries} == {-0.5}


def test_plain_completions(served: Served, client: openai.OpenAI) -> None:
    ids = served.engine.renderer.encode(["<|im_start|>assistant\n"])[0]
    answer = client.completions.create(
        model="math", prompt=[ids, ids], n=2, max_tokens=5, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == ["It is"] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * len(ids)
    assert served.engine.requests[-1].header_length == len(ids)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "It is"
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    stream = client.completions.create(model="math", prompt="2 + 2 =", stream=True, max_tokens=50)
    assert "".join(chunk.choices[0].text for chunk in stream) == "It is 4. END"
    assert (
        list(served.engine.requests[-1].prompt_ids) == served.engine.renderer.encode(["2 + 2 ="])[0]
    )


def test_several_plain_completions_in_one_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="math",
        prompt=["a", "b"],
        n=2,
        logprobs=0,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, offsets = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    usage = None
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset or [] if choice.logprobs else []
    assert texts == ["It is"] * 4
    assert offsets == [[0, 1, 2, 3, 4]] * 4
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 20)


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="math", messages=QUESTION, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.InternalServerError, match="no luck"):
        client.chat.completions.create(model="math", messages=[{"role": "user", "content": "fail"}])


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="math", messages=[{"role": "user", "content": "fail"}], stream=True
    )
    with pytest.raises(openai.APIError, match="no luck"):
        list(stream)


def test_a_full_queue_is_a_rate_limit(served: Served, client: openai.OpenAI) -> None:
    served.engine.max_waiting = 2
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="math", messages=QUESTION, n=3)
    finally:
        served.engine.max_waiting = 64
    assert refused.value.response.headers["retry-after"] == "3"
    # The two that had been taken in are not left running.
    wait_for(lambda: served.engine.live == 0)
    assert len(served.engine.cancelled) >= 2


def test_closing_a_stream_cancels_it(served: Served, client: openai.OpenAI) -> None:
    cancelled = len(served.engine.cancelled)
    stream = client.chat.completions.create(
        model="math", messages=[{"role": "user", "content": "long"}], stream=True
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: len(served.engine.cancelled) == cancelled + 1)
    wait_for(lambda: served.engine.live == 0)
