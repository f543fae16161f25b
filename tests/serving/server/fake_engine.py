"""An engine without a model: answers from a script, token by token, in threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.data.helpers import tiny_tokenizer

from prefillshare_train.data import Renderer, make_renderer
from prefillshare_train.serving.api import (
    EngineStats,
    EngineStoppedError,
    Event,
    EventSink,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    ServingError,
    TokenLogprob,
    Usage,
)

BLOCK = 16
Script = Callable[[GenerationRequest], str]


def renderer() -> Renderer:
    """The packaged tool template over a tokenizer whose every byte is a token."""
    return make_renderer(tiny_tokenizer(), chat_template="chatml-tools")


@dataclass
class _Running:
    request: GenerationRequest
    sink: EventSink
    cancelled: threading.Event = field(default_factory=threading.Event)


class FakeEngine:
    """Implements `EngineClient`.

    Args:
        script: text of the response to a request; may raise, which ends it with an error.
        delay_s: before each token.
        max_waiting: responses that may run at once; one more is refused.
    """

    def __init__(
        self,
        script: Script | str = "It is 4.",
        *,
        decoders: tuple[str, ...] = ("math", "code"),
        delay_s: float = 0.0,
        max_waiting: int = 64,
        max_prompt_tokens: int = 511,
    ) -> None:
        self.script: Script = (lambda _: script) if isinstance(script, str) else script
        self.decoders = decoders
        self.renderer = renderer()
        self.max_prompt_tokens = max_prompt_tokens
        self.delay_s = delay_s
        self.max_waiting = max_waiting
        self.accepting = True
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self._running: dict[str, _Running] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._sums: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def live(self) -> int:
        """Responses that run now."""
        return len(self._running)

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        if not self.accepting:
            raise EngineStoppedError("the engine is stopping")
        if not 0 < len(request.prompt_ids) <= self.max_prompt_tokens:
            raise ServingError("the prompt is empty or too long")
        with self._lock:
            if len(self._running) >= self.max_waiting:
                raise QueueFullError(len(self._running), 2.4)
            running = _Running(request, sink)
            self._running[request.request_id] = running
            self.requests.append(request)
        threading.Thread(target=self._answer, args=(running,), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        running = self._running.get(request_id)
        if running is not None:
            self.cancelled.append(request_id)
            running.cancelled.set()

    def end_session(self, session: str) -> None: ...

    def drain(self, timeout_s: float) -> bool:
        """As the real engine's."""
        self.accepting = False
        deadline = time.monotonic() + timeout_s
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._running

    def stats(self) -> EngineStats:
        sums = self._sums
        return EngineStats(
            waiting=0,
            prefilling=0,
            decoding=self.live,
            sessions=0,
            sessions_waiting=0,
            blocks_total=64,
            blocks_used=self.live,
            blocks_cached=min(len(self._seen), 32),
            block_tokens=BLOCK,
            block_bytes=1024,
            peak_kv_bytes=65536,
            staged_blocks=0,
            staged_out_bytes=0,
            staged_in_bytes=0,
            evicted_blocks=0,
            prompt_tokens=sums["prompt"],
            cached_tokens=sums["cached"],
            prefilled_tokens=sums["prefilled"],
            completion_tokens=sums["completion"],
            retokenized_misses=0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
            decode_steps=sums["completion"],
            decode_rows=sums["completion"],
            finished={},
            workers_alive=1,
            workers_total=1,
        )

    def _answer(self, running: _Running) -> None:
        start = time.monotonic()
        request = running.request
        cached = self._look_up(request)
        try:
            text, stop = self._text(request)
        except Exception as error:
            usage = self._usage(request, cached, 0, start, None)
            self._end(
                running, Event(request.request_id, (), "", (), "error", None, str(error), usage)
            )
            return
        ids = self.renderer.encode([text])[0]
        reason: FinishReason = "stop"
        if len(ids) >= request.sampling.max_tokens:
            ids, reason, stop = ids[: request.sampling.max_tokens], "length", None
        first = None
        for count, token in enumerate(ids, start=1):
            if running.cancelled.wait(self.delay_s):
                usage = self._usage(request, cached, count, start, first)
                self._end(
                    running, Event(request.request_id, finish_reason="cancelled", usage=usage)
                )
                return
            first = first or time.monotonic()
            piece = self.renderer.decode([token])
            running.sink(Event(request.request_id, (token,), piece, self._logprobs(request, token)))
        usage = self._usage(request, cached, len(ids), start, first)
        end = Event(request.request_id, finish_reason=reason, stop_reason=stop, usage=usage)
        self._end(running, end)

    def _end(self, running: _Running, event: Event) -> None:
        assert event.usage is not None
        self._sums["prompt"] += event.usage.prompt_tokens
        self._sums["cached"] += event.usage.cached_tokens
        self._sums["prefilled"] += event.usage.prefilled_tokens
        self._sums["completion"] += event.usage.completion_tokens
        self._running.pop(event.request_id, None)
        running.sink(event)

    def _text(self, request: GenerationRequest) -> tuple[str, str | None]:
        text = self.script(request)
        found = [(text.index(stop), stop) for stop in request.sampling.stop if stop in text]
        place, stop = min(found, default=(len(text), None))
        return text[:place], stop

    def _logprobs(self, request: GenerationRequest, token: int) -> tuple[TokenLogprob, ...]:
        count = request.sampling.logprobs
        if count is None:
            return ()
        top = tuple((token + place, -0.5 - place) for place in range(count))
        return (TokenLogprob(token, -0.5, top),)

    def _look_up(self, request: GenerationRequest) -> int:
        """Tokens in whole blocks that an earlier prompt began with; notes this one's."""
        ids = request.prompt_ids[:-1]
        prefixes = [ids[:end] for end in range(BLOCK, len(ids) + 1, BLOCK)]
        with self._lock:
            cached = sum(BLOCK for prefix in prefixes if prefix in self._seen)
            self._seen.update(prefixes)
        return cached

    def _usage(
        self, request: GenerationRequest, cached: int, count: int, start: float, first: float | None
    ) -> Usage:
        prompt = len(request.prompt_ids)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            prefilled_tokens=prompt - 1 - cached,
            decoder_prompt_tokens=1,
            completion_tokens=count,
            queued_s=0.0,
            ttft_s=None if first is None else first - start,
            total_s=time.monotonic() - start,
        )
