"""`/v1/completions`: text or token ids as they are, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefillshare_train.serving.api import Event, Generation, TokenLogprob
from prefillshare_train.serving.server.event_stream import EventStream
from prefillshare_train.serving.server.logprobs import completion_logprobs
from prefillshare_train.serving.server.requests import CompletionRequest
from prefillshare_train.serving.server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    error_responses,
    usage_of,
)
from prefillshare_train.serving.server.service import Answering, Service

_DEFAULT_TOKENS = 16
"""OpenAI's own."""
_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 429, 500, 503)
_STREAM = {"description": "The completion, or its events", "content": {"text/event-stream": {}}}


def completions_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["completions"])

    @router.post(
        "/v1/completions",
        response_model=Completion,
        response_model_exclude_unset=True,
        responses={200: _STREAM, **_ERRORS},
        summary="Continue a text",
    )
    async def completions(body: CompletionRequest, request: Request) -> Completion | Response:
        service.admit(body)
        prompts = await service.prompts.completion(body)
        answering = service.accept(
            body,
            prompts,
            prefix="cmpl",
            prompt_field="prompt",
            max_tokens=body.max_tokens,
            default_tokens=_DEFAULT_TOKENS,
            logprobs=body.logprobs,
        )
        if body.stream:
            count = len(prompts) * answering.choices_per_prompt
            return EventStream(answering.running, _chunks(service, body, answering, count))
        generations = await service.collect(answering, request)
        whole = _completion(body, answering)
        whole.choices = [
            CompletionChoice(
                index=index,
                text=generation.text,
                logprobs=_logprobs(service, body, generation.logprobs, 0),
                finish_reason=_finish_reason(generation.finish_reason),
            )
            for index, generation in enumerate(generations)
        ]
        whole.usage = usage_of(generations, answering.choices_per_prompt)
        return whole

    return router


async def _chunks(
    service: Service, body: CompletionRequest, answering: Answering, count: int
) -> AsyncIterator[Completion]:
    """The stream: a chunk a token, also where its text is held back or it has none; the usage.

    Clients time tokens by chunks.
    """
    events: list[list[Event]] = [[] for _ in range(count)]
    offsets = [0] * count
    async for index, event in answering.running.events():
        events[index].append(event)
        logprobs = _logprobs(service, body, event.logprobs, offsets[index])
        if logprobs is not None:
            offsets[index] += sum(map(len, logprobs.tokens))
        chunk = _completion(body, answering)
        chunk.choices = [
            CompletionChoice(
                index=index,
                text=event.text,
                logprobs=logprobs,
                finish_reason=event.finish_reason and _finish_reason(event.finish_reason),
            )
        ]
        yield chunk
    if body.stream_options is not None and body.stream_options.include_usage:
        last = _completion(body, answering)
        last.usage = usage_of([Generation.of(own) for own in events], answering.choices_per_prompt)
        yield last


def _completion(body: CompletionRequest, answering: Answering) -> Completion:
    return Completion(
        id=answering.id,
        object="text_completion",
        created=answering.created,
        model=body.model,
        choices=[],
    )


def _logprobs(
    service: Service, body: CompletionRequest, entries: Sequence[TokenLogprob], offset: int
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    return completion_logprobs(entries, service.token_texts, offset)


def _finish_reason(reason: str) -> FinishReason:
    return "length" if reason == "length" else "stop"
