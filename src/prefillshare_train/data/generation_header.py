"""The tokens with which a template opens an assistant's answer.

Data is rendered with the text at hand, so that the header of each prompt is known. Where only token
ids are there (`generate`, an aLoRA's invocation tokens, vLLM) the header must be the same for every
conversation; this is where that is found out.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefillshare_train.core.spans import Conversation
from prefillshare_train.data.errors import DataError
from prefillshare_train.data.rendering import Renderer, RenderError
from prefillshare_train.data.rows import Message, Tool

_TAIL = 16
# What precedes a header decides whether its tokens merge with it.
_USER_TEXTS = ("a", "a\n", "a\n\n", "a ", "1", "?", "é", "```")


def generation_header(renderer: Renderer) -> tuple[int, ...]:
    """Token ids of the generation prompt.

    Returns:
        One token or more: what every prompt that the renderer makes ends in.

    Raises:
        DataError: the template has no generation prompt, or its tokens depend on what precedes.
    """
    found: dict[tuple[int, ...], str] = {}
    for messages in _probes():
        try:
            ids, length = prompt_and_header(messages, renderer)
        except RenderError:
            continue  # a template may refuse system messages
        found.setdefault(tuple(ids[len(ids) - length :]), renderer.decode(ids))
    if not found:
        raise DataError(f"the template {renderer.name} renders none of the usual conversations")
    if () in found:
        raise DataError(
            f"the template {renderer.name} has no assistant header, or merges it with the text "
            f"before it: {found[()][-40:]!r}"
        )
    if len(found) > 1:
        shown = " and ".join(repr(renderer.decode(ids)) for ids in list(found)[:2])
        raise DataError(
            f"the assistant header of the template {renderer.name} is not the same in every "
            f"conversation: {shown}"
        )
    return next(iter(found))


def require_headers(conversations: Sequence[Conversation], renderer: Renderer) -> None:
    """Check that the prompt of every turn ends in a header, for a boundary that lies before it.

    Raises:
        DataError: some do not; says how many, and how the first of them ends.
    """
    prompts = [
        (conversation.token_ids[: turn.prompt_length], turn.header_length)
        for conversation in conversations
        for turn in conversation.turns
    ]
    bare = [ids for ids, length in prompts if length == 0]
    if bare:
        raise DataError(
            f"boundary generation_prompt: {len(bare)} of {len(prompts)} prompts have no assistant "
            "header, or one whose first token merges with the text before it; the first of them "
            f"ends in {renderer.decode(bare[0][-_TAIL:])!r}. Set boundary: last_token, or "
            "data.chat_template to one whose header begins with a special token"
        )


def plain_header(renderer: Renderer) -> tuple[int, ...]:
    """The generation prompt after a plain user message, for prompts that come as token ids.

    Returns:
        Token ids; none where the template has no generation prompt or refuses the message.
    """
    try:
        ids, length = prompt_and_header([{"role": "user", "content": "a"}], renderer)
    except DataError:
        return ()
    return tuple(ids[len(ids) - length :])


def header_at_end(ids: Sequence[int], header: Sequence[int]) -> int:
    """Tokens of a header that a prompt ends in: all of them, or 0."""
    ends = bool(header) and tuple(ids[-len(header) :]) == tuple(header)
    return len(header) if ends else 0


def prompt_and_header(
    messages: Sequence[Message], renderer: Renderer, tools: Sequence[Tool] | None = None
) -> tuple[list[int], int]:
    """The prompt of the next assistant turn, and how many tokens at its end are its header.

    The messages are rendered as they are: add the system prompt before.

    Raises:
        DataError: the template refuses them.
    """
    bare = renderer.text(messages, tools, add_generation_prompt=False)
    prompt = renderer.text(messages, tools, add_generation_prompt=True)
    ids = renderer.encode([prompt])[0]
    return ids, renderer.header_length(bare, prompt, ids)


def _probes() -> list[list[Message]]:
    turns: list[list[Message]] = [[{"role": "user", "content": text}] for text in _USER_TEXTS]
    turns.append([{"role": "system", "content": "b"}, {"role": "user", "content": "a"}])
    turns.append(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    )
    return turns
