"""When chunks come: clients that measure take their times for the tokens'."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import HI, serve, wait_for

from prefillshare_train.serving.api import EventSink, GenerationRequest


def data_of(lines: list[str]) -> list[dict[str, Any]]:
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(data) for data in found if data != "[DONE]"]


@pytest.mark.parametrize("n", [1, 2])
def test_nothing_is_sent_before_the_first_token(n: int) -> None:
    released = threading.Event()

    def script(_: GenerationRequest) -> str:
        assert released.wait(20)
        return "Hi"

    body = {"model": "math", "messages": HI, "stream": True, "n": n}
    engine, lines = FakeEngine(script), list[str]()
    with serve(engine) as served:

        def read() -> None:
            with served.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    lines.append(line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: engine.live == n)
        time.sleep(0.5)
        assert lines == []
        released.set()
        reader.join(20)
    chunks = data_of(lines)
    for index in range(n):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hi"


class Silent(FakeEngine):
    """Its tokens but the first have no text, as special tokens and parts of characters."""

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        seen: list[int] = []

        def hide(event: Any) -> None:
            seen.extend(event.token_ids)
            object.__setattr__(event, "text", event.text if len(seen) == 1 else "")
            sink(event)

        super().submit(request, hide)


def test_every_token_of_a_completion_has_its_chunk() -> None:
    with serve(Silent("abcd")) as served:
        answer = served.complete(stream=True)
    texts = [chunk["choices"][0]["text"] for chunk in data_of(answer.text.splitlines())]
    assert texts == ["a", "", "", "", ""]  # and the end, which brings no token here


def test_fields_of_load_generators_are_taken() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with serve() as served:
        answer = served.complete(stream=True, stream_options=options)
    assert answer.status_code == 200
    assert data_of(answer.text.splitlines())[-1]["usage"]["completion_tokens"] > 0
