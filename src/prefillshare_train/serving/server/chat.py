"""`/v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefillshare_train.serving.api import Event, Generation
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.event_stream import EventStream
from prefillshare_train.serving.server.logprobs import chat_logprobs
from prefillshare_train.serving.server.requests import ChatRequest
from prefillshare_train.serving.server.responses import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    FinishReason,
    ToolCall,
    ToolCallDelta,
    error_responses,
    usage_of,
)
from prefillshare_train.serving.server.service import Answering, Service
from prefillshare_train.serving.server.tool_calls import Call, Piece, ToolCallParser

_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 429, 500, 503)
_STREAM = {"description": "The completion, or its events", "content": {"text/event-stream": {}}}


def chat_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["completions"])

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        response_model_exclude_unset=True,
        responses={200: _STREAM, **_ERRORS},
        summary="Answer a conversation",
    )
    async def chat_completions(body: ChatRequest, request: Request) -> ChatCompletion | Response:
        service.admit(body)
        logprobs = _logprobs(body)
        prompt = await service.prompts.chat(body)
        answering = service.accept(
            body,
            [prompt],
            prefix="chatcmpl",
            prompt_field="messages",
            max_tokens=_max_tokens(body),
            default_tokens=None,
            logprobs=logprobs,
        )
        if body.stream:
            return EventStream(answering.running, _chunks(service, body, answering))
        generations = await service.collect(answering, request)
        return ChatCompletion(
            id=answering.id,
            object="chat.completion",
            created=answering.created,
            model=body.model,
            choices=[
                _choice(service, body, index, generation)
                for index, generation in enumerate(generations)
            ],
            usage=usage_of(generations, answering.choices_per_prompt),
        )

    return router


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        message = "max_tokens and max_completion_tokens differ; give one of them"
        raise ApiError(400, message, param="max_tokens")
    return body.max_completion_tokens


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def _parser(body: ChatRequest) -> ToolCallParser | None:
    if not body.tools or body.tool_choice == "none":
        return None
    return ToolCallParser([tool.function.name for tool in body.tools])


def _choice(service: Service, body: ChatRequest, index: int, generation: Generation) -> ChatChoice:
    parser = _parser(body)
    pieces: list[Piece] = [generation.text]
    if parser is not None:
        pieces = [*parser.feed(generation.text), *parser.finish()]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = [
        ToolCall(id=_call_id(), type="function", function=_function(piece))
        for piece in pieces
        if isinstance(piece, Call)
    ]
    message = AnswerMessage(role="assistant", content=text or (None if calls else ""), refusal=None)
    if calls:
        message.tool_calls = calls
    logprobs = None
    if body.logprobs:
        logprobs = chat_logprobs(generation.logprobs, service.token_texts)
    return ChatChoice(
        index=index,
        message=message,
        logprobs=logprobs,
        finish_reason=_finish_reason(generation.finish_reason, bool(calls)),
    )


async def _chunks(
    service: Service, body: ChatRequest, answering: Answering
) -> AsyncIterator[ChatChunk]:
    """The stream: each choice's role, its news as they come, its end; then the usage.

    The role comes with the first news: clients take the first chunk for the first token.
    """
    choices = [_StreamedChoice(service, body, index) for index in range(body.n or 1)]
    async for index, event in answering.running.events():
        if not choices[index].events:
            yield _chunk(body, answering, [choices[index].opening()])
        for news in choices[index].take(event):
            yield _chunk(body, answering, [news])
    if body.stream_options is not None and body.stream_options.include_usage:
        generations = [Generation.of(choice.events) for choice in choices]
        last = _chunk(body, answering, [])
        last.usage = usage_of(generations, answering.choices_per_prompt)
        yield last


class _StreamedChoice:
    """One choice of a stream."""

    def __init__(self, service: Service, body: ChatRequest, index: int) -> None:
        self.events: list[Event] = []
        self._index = index
        self._texts = service.token_texts
        self._wants_logprobs = bool(body.logprobs)
        self._parser = _parser(body)
        self._calls = 0

    def opening(self) -> ChatChunkChoice:
        """The role."""
        return self._news(ChatDelta(role="assistant", content=""))

    def take(self, event: Event) -> list[ChatChunkChoice]:
        """What an event brings."""
        self.events.append(event)
        news = [self._news(self._delta(piece)) for piece in self._pieces(event)]
        if self._wants_logprobs and event.logprobs:
            # Tokens whose text is held back still tell their log-probabilities at once.
            news = news or [self._news(ChatDelta(content=""))]
            news[0].logprobs = chat_logprobs(event.logprobs, self._texts)
        if event.finish_reason is not None:
            end = self._news(ChatDelta())
            end.finish_reason = _finish_reason(event.finish_reason, self._calls > 0)
            news.append(end)
        return news

    def _pieces(self, event: Event) -> list[Piece]:
        if self._parser is None:
            return [event.text] if event.text else []
        pieces = self._parser.feed(event.text)
        return pieces + self._parser.finish() if event.finish_reason is not None else pieces

    def _delta(self, piece: Piece) -> ChatDelta:
        if isinstance(piece, str):
            return ChatDelta(content=piece)
        number, self._calls = self._calls, self._calls + 1
        call = ToolCallDelta(
            index=number, id=_call_id(), type="function", function=_function(piece)
        )
        return ChatDelta(tool_calls=[call])

    def _news(self, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(index=self._index, delta=delta, finish_reason=None)


def _chunk(body: ChatRequest, answering: Answering, choices: list[ChatChunkChoice]) -> ChatChunk:
    return ChatChunk(
        id=answering.id,
        object="chat.completion.chunk",
        created=answering.created,
        model=body.model,
        choices=choices,
    )


def _function(call: Call) -> CalledFunction:
    return CalledFunction(name=call.name, arguments=call.arguments)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _finish_reason(reason: str | None, has_calls: bool) -> FinishReason:
    finish: Literal["stop", "length"] = "length" if reason == "length" else "stop"
    return "tool_calls" if has_calls and finish == "stop" else finish
