"""From request bodies to prompt token ids, off the event loop and bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from prefillshare_train.data import DataError, Message, Renderer
from prefillshare_train.data.generation_header import header_at_end, plain_header
from prefillshare_train.serving.api import QueueFullError
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.requests import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    for_template,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, and how many at its end are the assistant header."""

    ids: tuple[int, ...]
    header_length: int


class PromptMaker:
    """Renders and encodes in one thread of its own.

    One thread, because a fast tokenizer must not be set up by two at once, and because prompts
    should not take the processor from the engine.

    Args:
        max_waiting: requests that may wait for the thread.
    """

    def __init__(self, renderer: Renderer, max_waiting: int) -> None:
        self._renderer = renderer
        self._max_waiting = max_waiting
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._header = plain_header(renderer)

    async def chat(self, body: ChatRequest) -> Prompt:
        """The prompt of a chat completion."""
        return await self._run(lambda: self._chat(body))

    async def completion(self, body: CompletionRequest) -> list[Prompt]:
        """The prompts of a plain completion."""
        return await self._run(lambda: self._completion(body))

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= self._max_waiting:
            raise QueueFullError(self._waiting, 1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def _chat(self, body: ChatRequest) -> Prompt:
        renderer = self._renderer
        messages = renderer.with_system_prompt(
            [_message(message, index) for index, message in enumerate(body.messages)]
        )
        tools = [tool.function.for_template() for tool in body.tools or []] or None
        try:
            bare = renderer.text(messages, tools, add_generation_prompt=False)
            text = renderer.text(messages, tools, add_generation_prompt=True)
            # Arguments and tools may hold halves of surrogate pairs, which no tokenizer takes.
            text.encode()
            ids = renderer.encode([text])[0]
            return Prompt(tuple(ids), renderer.header_length(bare, text, ids))
        except (DataError, UnicodeEncodeError, RecursionError) as error:
            raise ApiError(400, _why(error), param="messages") from error

    def _completion(self, body: CompletionRequest) -> list[Prompt]:
        given = body.prompt
        if isinstance(given, str):
            prompts: Sequence[Any] = [given]
        else:
            prompts = [given] if isinstance(given[0], int) else given
        return [self._completion_prompt(prompt, body) for prompt in prompts]

    def _completion_prompt(self, prompt: str | list[int], body: CompletionRequest) -> Prompt:
        tokenizer = self._renderer.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer(
                prompt,
                add_special_tokens=body.add_special_tokens is not False,
                padding=False,
                truncation=False,
                verbose=False,
            )["input_ids"]
        else:
            ids = prompt
            unknown = next((token for token in ids if token >= len(tokenizer)), None)
            if unknown is not None:
                message = f"token id {unknown} is none of the tokenizer's {len(tokenizer)}"
                raise ApiError(400, message, param="prompt")
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return Prompt(tuple(ids), header_at_end(ids, self._header))


def _message(message: Any, index: int) -> Message:
    plain = for_template(message)
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, index, number),
                },
            }
            | ({} if call.id is None else {"id": call.id})
            for number, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(text: str, index: int, number: int) -> dict[str, Any]:
    """The arguments as an object, as the templates and the training data have them."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        param = f"messages.{index}.tool_calls.{number}.function.arguments"
        raise ApiError(400, f"{param}: should be a JSON object, written as a string", param=param)
    return value


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "the text holds half a surrogate pair, which is no character"
    if isinstance(error, RecursionError):
        return "the messages or tools are nested too deeply"
    return str(error)
