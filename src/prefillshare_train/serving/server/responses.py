"""Response bodies, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from prefillshare_train.serving.api import EngineStats, Generation

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Any answer other than 200."""

    error: ErrorDetail


class Model(BaseModel):
    """A decoder."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int = Field(description="Tokens of a prompt and its response together.")


class ModelList(BaseModel):
    """All decoders."""

    object: Literal["list"] = "list"
    data: list[Model]


class PromptTokensDetails(BaseModel):
    """Where the prompt's K/V came from."""

    cached_tokens: int


class PrefillUsage(BaseModel):
    """What sharing did for this request; no part of OpenAI's form.

    `prefilled_tokens`: prompt tokens that the base ran now. `decoder_prompt_tokens`: those that
    the decoder runs itself. `queued_s`: before its prefill could begin. `ttft_s`: to the first
    response token.
    """

    prefilled_tokens: int
    decoder_prompt_tokens: int
    queued_s: float
    ttft_s: float | None


class Usage(BaseModel):
    """Tokens of a request. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    prefillshare: PrefillUsage


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """The chosen token, and those that could have been."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """An assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Body of a chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(ToolCall):
    """A call of a tool, as a stream brings it."""

    index: int


class ChatDelta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The news of one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the completions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Body of a completion, and an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Health(BaseModel):
    """Whether the server is alive, or ready."""

    status: str


class DecoderStats(BaseModel):
    """A decoder's latest responses."""

    responses: int
    ttft_last_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None


class Stats(BaseModel):
    """What the page shows."""

    uptime_s: float
    accepting: bool
    hit_ratio: float | None = Field(description="Of all prompt tokens so far, those found cached.")
    decoders: dict[str, DecoderStats]
    engine: EngineStats


def usage_of(generations: list[Generation], choices_per_prompt: int) -> Usage:
    """The usage of one HTTP request; its choices in the order of their prompts."""
    usages = [generation.usage for generation in generations]
    first_of_prompt = usages[::choices_per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in first_of_prompt)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    first_tokens = [usage.ttft_s for usage in usages if usage.ttft_s is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.cached_tokens for usage in first_of_prompt)
        ),
        prefillshare=PrefillUsage(
            prefilled_tokens=sum(usage.prefilled_tokens for usage in usages),
            decoder_prompt_tokens=sum(usage.decoder_prompt_tokens for usage in usages),
            queued_s=max(usage.queued_s for usage in usages),
            ttft_s=min(first_tokens, default=None),
        ),
    )


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors."""
    return {status: {"model": ErrorResponse} for status in statuses}
