"""Request bodies: OpenAI's fields, and the further ones that vLLM takes too.

A field that would change the answer and is not supported only takes its neutral value, so that
the OpenAPI document and the error say so. Fields that change nothing here are taken and ignored.
Of lists and objects that may be long the first error is enough: to list them all for a body of
megabytes would hold up the event loop for seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefillshare_train.data import Message, Tool

Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]


class Strict(BaseModel):
    """A body that takes no unknown field, no NaN, and no number written as a string."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        known = len(cls.model_fields)
        if isinstance(value, dict) and len(value) > known:
            raise ValueError(f"{len(value)} fields were given, and there are {known}")
        return value


class StreamOptions(Strict):
    """What a stream holds besides its tokens."""

    include_usage: bool | None = Field(
        default=None, description="Add a last chunk that carries the usage."
    )
    include_obfuscation: Ignored = None
    continuous_usage_stats: Ignored = None


class SamplingFields(Strict):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(description="Name of a decoder.")]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 is greedy; 1 where absent."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="-1 or 0 for all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        default=None, description="Choice i draws with seed + i."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: Name | None = Field(
        default=None, description="The agent session that this turn belongs to."
    )
    end_session: bool | None = Field(
        default=None, description="This is the session's last turn: its reservation ends."
    )
    cache_salt: Name | None = Field(
        default=None, description="Requests with different salts never share a cached block."
    )
    frequency_penalty: Zero | None = Field(default=None, description="Only 0.")
    presence_penalty: Zero | None = Field(default=None, description="Only 0.")
    logit_bias: Empty | None = Field(default=None, description="Only empty.")
    user: Ignored = None

    @property
    def prompt_count(self) -> int:
        """Prompts in the body."""
        return 1


class TextPart(Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class InstructionMessage(Strict):
    """A system or developer message."""

    role: Literal["system", "developer"]
    content: Content
    name: Ignored = None


class UserMessage(Strict):
    """A user's message."""

    role: Literal["user"]
    content: Content
    name: Ignored = None


class FunctionCall(Strict):
    """Which function was called, with its arguments as JSON."""

    name: Name
    arguments: str


class ToolCallMessage(Strict):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored = None


class AssistantMessage(Strict):
    """An assistant's message, as a response of this server gave it."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """What a called tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: Ignored = None


ChatMessage = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[
        bool | None,
        Field(description="Accepted; calls are not held to the schema while they are generated."),
    ] = None

    def for_template(self) -> Tool:
        """As the chat template takes it, and as decoders were trained on it."""
        values = self.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": values}


class ToolDefinition(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class TextFormat(Strict):
    """The form of the answer; only text is supported."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(
        default=None,
        description="`none`: the prompt stays the same, and the answer is not read for calls.",
    )
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        Field(description="Text, token ids, or several of either."),
    ]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="16 where absent."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Let the tokenizer add BOS to text; true where absent."
    )
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(default=None, description="Only 1.")
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = Field(
        default=None, description="Only empty."
    )

    @property
    def prompt_count(self) -> int:
        """Prompts in the body."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return 1 if alone else len(self.prompt)


def for_template(
    message: InstructionMessage | UserMessage | AssistantMessage | ToolMessage,
) -> Message:
    """The message in the form that chat templates take, but for the arguments of calls."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or [])
    plain: Message = {"role": message.role, "content": text}
    if isinstance(message, ToolMessage) and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain
