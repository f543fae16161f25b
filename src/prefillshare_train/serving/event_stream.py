"""Reading server-sent events, as OpenAI's protocol streams responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable

_END = "[DONE]"


async def event_data(
    parts: AsyncIterable[bytes], on_end: Callable[[], object] = lambda: None
) -> AsyncGenerator[str]:
    """The data of each event, up to `[DONE]`; events of several lines are not of this protocol.

    An event's JSON may hold U+2028 or U+0085 as they are. They end a line for `str.splitlines` and
    so for httpx's `aiter_lines`, but not in an event stream.

    Args:
        parts: the body, however it was cut on its way.
        on_end: told of `[DONE]`, which a stream that broke off lacks.
    """
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            name, _, value = line.decode(errors="replace").partition(":")
            data = value.strip(" \r")
            if name != "data" or not data:
                continue
            if data == _END:
                on_end()
                return
            yield data
