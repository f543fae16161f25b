"""Server-sent events, however their bytes are cut on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from prefillshare_train.serving.event_stream import event_data


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_data_of_events(size: int) -> None:
    said = [{"text": "a\u2028b\x85c\u2029"}, {"text": "é\r\n\x1c"}]
    events = [f"data: {json.dumps(piece, ensure_ascii=False)}\r\n\r\n" for piece in said]
    body = (": a comment\n\n" + "".join(events) + "event: x\ndata: [DONE]\n\ndata: {}\n\n").encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def read() -> list[str]:
        return [data async for data in event_data(parts())]

    assert [json.loads(data) for data in asyncio.run(read())] == said
