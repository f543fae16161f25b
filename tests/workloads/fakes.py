"""A scripted engine and small sessions."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable
from typing import Any

from prefillshare_train.data.rendering import RenderError
from prefillshare_train.serving.api import (
    EngineStats,
    Event,
    EventSink,
    GenerationRequest,
    QueueFullError,
    ServingError,
    Usage,
)
from prefillshare_train.workloads.lengths import Lengths, Quantiles
from prefillshare_train.workloads.sessions import SessionPlan

DECODERS = ("a", "b", "c", "d")
_ZEROS = {
    field.name: {} if field.name == "finished" else 0 for field in dataclasses.fields(EngineStats)
}


def constant(value: float) -> Quantiles:
    """Always the same length."""
    return Quantiles((value,) * 7)


LENGTHS = Lengths(
    "test",
    question=constant(3),
    thought=constant(5),
    action=constant(2),
    observation=constant(7),
    steps=constant(3),
    verdict=constant(4),
    reflection=constant(6),
)


def plan(kind: str = "react", **options: Any) -> SessionPlan:
    """Small sessions of fixed lengths."""
    settings = {
        "decoders": DECODERS,
        "vocabulary": tuple(range(10, 90)),
        "lengths": LENGTHS,
        "system_tokens": 8,
        **options,
    }
    return SessionPlan(kind, **settings)


class FakeRenderer:
    """A message is one token, its length; none may be empty."""

    def __init__(self, header: tuple[int, ...]) -> None:
        self._header = "".join(map(chr, header))

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return messages

    def text(
        self, messages: list[dict[str, Any]], tools: object, *, add_generation_prompt: bool
    ) -> str:
        if not all(message["content"] for message in messages):
            raise RenderError("the template refuses the messages")
        text = "".join(chr(len(message["content"])) for message in messages)
        return text + self._header if add_generation_prompt else text

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]

    def header_length(self, bare: str, prompt: str, prompt_ids: list[int]) -> int:
        return len(prompt) - len(bare)


class FakeEngine:
    """Answers every request in a thread of its own; nothing is computed.

    Args:
        first_s, each_s: seconds to the first token and for each further one.
        refuse: so many submissions are refused before one is taken.
        fail: names of decoders whose responses end with an error.
        silent: names of decoders that never answer.
        header: what its template opens an answer with.
    """

    decoders = DECODERS
    max_prompt_tokens = 10_000

    def __init__(
        self,
        *,
        first_s: float = 0.0,
        each_s: float = 0.0,
        refuse: int = 0,
        fail: Iterable[str] = (),
        silent: Iterable[str] = (),
        header: tuple[int, ...] = (),
    ) -> None:
        self._first_s, self._each_s = first_s, each_s
        self._refuse = refuse
        self._fail, self._silent = set(fail), set(silent)
        self._renderer = FakeRenderer(header)
        self._lock = threading.Lock()
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.ended_sessions: list[str] = []
        self.running = self.most_running = 0
        self.started = self.stopped = 0
        self._counts = {"prefilled_tokens": 0, "completion_tokens": 0}

    @property
    def renderer(self) -> Any:
        return self._renderer

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        if request.decoder not in self.decoders:
            raise ServingError(f"there is no decoder {request.decoder!r}")
        with self._lock:
            if self._refuse:
                self._refuse -= 1
                raise QueueFullError(1, 0.01)
            self.requests.append(request)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        threading.Thread(target=self._answer, args=(request, sink), daemon=True).start()

    def _answer(self, request: GenerationRequest, sink: EventSink) -> None:
        if request.decoder in self._silent:
            return
        count = request.sampling.max_tokens
        prompt = len(request.prompt_ids)
        usage = Usage(prompt, 1, prompt - 2, 1, count, 0.0, self._first_s, 0.0)
        with self._lock:
            self._counts["prefilled_tokens"] += prompt - 2
            self._counts["completion_tokens"] += count
        time.sleep(self._first_s)
        failing = request.decoder in self._fail
        for number in range(count):
            if number:
                time.sleep(self._each_s)
            end = number == count - 1
            with self._lock:
                self.running -= end
            sink(
                Event(
                    request.request_id,
                    (200 + number,),
                    "x",
                    finish_reason=("error" if failing else "length") if end else None,
                    error="it broke" if end and failing else None,
                    usage=usage if end else None,
                )
            )

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def end_session(self, session: str) -> None:
        self.ended_sessions.append(session)

    def stats(self) -> EngineStats:
        with self._lock:
            seconds = {
                "prefill_seconds": 0.001 * self._counts["prefilled_tokens"],
                "decode_seconds": 0.01 * self._counts["completion_tokens"],
                "decode_steps": self._counts["completion_tokens"],
                "decode_rows": 2 * self._counts["completion_tokens"],
                "peak_kv_bytes": 4096,
            }
            return EngineStats(**{**_ZEROS, **self._counts, **seconds})  # type: ignore[arg-type]
