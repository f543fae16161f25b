"""What templates silently leave out.

Tools and tool calls are found on the first row with them, which is refused; reasoning is counted,
since some templates leave it out on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefillshare_train.data.errors import DataError
from prefillshare_train.data.rendering import Renderer
from prefillshare_train.data.rows import REASONING, Message, Row, Tool

_FIX = "Set data.chat_template to one that shows them, such as chatml-tools"


def tools_left_out(
    renderer: Renderer,
    tools: Sequence[Tool],
    messages: Sequence[Message],
    prompt: str,
    owner: str,
) -> str:
    """What a prompt lacks of its tools, in words; empty where it shows them all.

    Args:
        messages: those of the prompt.
        prompt: their rendering, with tools and generation prompt.
        owner: what the tools belong to, such as `row`.

    Raises:
        RenderError: the template refuses the messages without tools.
    """
    if renderer.text(messages, None, add_generation_prompt=True) == prompt:
        return (
            f"the {owner} has tools, but the template {renderer.name} ignores them: the prompt is "
            "the same with and without"
        )
    missing = _missing(tools, prompt)
    if missing:
        return (
            f"the template {renderer.name} leaves out {len(missing)} of the {owner}'s "
            f"{len(tools)} tools: {', '.join(missing)}"
        )
    return ""


class ToolChecks:
    """Compares renderings with and without tools; remembers what one renderer has passed."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._shows_tools = False
        self._shows_calls = False

    def tools(self, row: Row, messages: Sequence[Message], prompt: str) -> None:
        """Check that the tools of a row are in its prompt.

        Args:
            messages: those before the first trained turn.
            prompt: their rendering, with tools and generation prompt.

        Raises:
            DataError: the prompt is the same without tools, or lacks the name of one.
            RenderError: the template refuses the messages without tools.
        """
        if not row.tools or (self._shows_tools and not _missing(row.tools, prompt)):
            return
        if fault := tools_left_out(self._renderer, row.tools, messages, prompt, "row"):
            raise DataError(f"{row.origin}: {fault}. {_FIX}")
        self._shows_tools = True

    def calls(self, row: Row, messages: Sequence[Message]) -> None:
        """Check that calls are rendered, also those in turns that are not trained.

        Args:
            messages: those up to the last trained turn, itself included.

        Raises:
            DataError: the rendering is the same without them.
            RenderError: the template refuses the messages.
        """
        calling = [index for index, message in enumerate(messages) if "tool_calls" in message]
        if self._shows_calls or not calling:
            return
        until = list(messages[: calling[0] + 1])
        without = {key: value for key, value in until[-1].items() if key != "tool_calls"}
        with_calls = self._renderer.text(until, row.tools, add_generation_prompt=False)
        if with_calls == self._renderer.text(
            [*until[:-1], without], row.tools, add_generation_prompt=False
        ):
            raise DataError(
                f"{row.origin}: the row has tool calls, but the template {self._renderer.name} "
                f"ignores them: the text is the same with and without. {_FIX}"
            )
        self._shows_calls = True

    def target(self, row: Row, message: Message, prompt: str, full: str) -> None:
        """Check that each call of a trained turn is in its response (some templates show one only).

        Raises:
            DataError: one is not.
        """
        response = full[len(prompt) :] if full.startswith(prompt) else full
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if not _names(response, name):
                raise DataError(
                    f"{row.origin}: the template {self._renderer.name} leaves out the call of "
                    f"{name}; it renders the turn as {response[-200:]!r}. {_FIX}"
                )


def reasoning_left_out(message: Message, response: str) -> bool:
    """Whether a trained message has reasoning that is not in its response."""
    texts = [message[key].strip() for key in REASONING if isinstance(message.get(key), str)]
    return any(text not in response for text in texts)


def _missing(tools: Sequence[Tool], prompt: str) -> list[str]:
    names = [tool["function"]["name"] for tool in tools]
    return [name for name in names if not _names(prompt, name)]


def _names(text: str, name: str) -> bool:
    return name in text or json.dumps(name)[1:-1] in text
