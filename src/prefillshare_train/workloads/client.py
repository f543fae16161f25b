"""What a load is sent to: one protocol, and the engine in this process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefillshare_train.data import DataError
from prefillshare_train.data.generation_header import (
    header_at_end,
    plain_header,
    prompt_and_header,
)
from prefillshare_train.serving.api import (
    EngineClient,
    EngineStats,
    EngineStoppedError,
    Event,
    GenerationRequest,
    QueueFullError,
    SamplingParams,
    ServingError,
)


@dataclass(frozen=True)
class Call:
    """One request of a load; greedy, and always `max_tokens` long.

    Attributes:
        session: name of its session.
        decoder: who is to answer.
        prompt_ids: token ids of the whole prompt; empty where `messages` are given.
        max_tokens: length of the response.
        messages: chat messages in place of token ids.
        last: the session's last call.
    """

    session: str
    decoder: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    messages: tuple[Mapping[str, Any], ...] | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, with the times that the client saw.

    Attributes:
        token_ids: of the response; empty where the server tells only text.
        text: of the response; empty where it was not asked for.
        completion_tokens: response tokens.
        ttft_s: from sending to the first token; None where none came.
        total_s: from sending to the end.
        prompt_tokens: of the whole prompt; None where unknown.
        cached_tokens: prompt tokens whose K/V were found; None where unknown.
        base_tokens: prompt tokens that the base ran or would have run; None where unknown.
        error: why there is no whole response.
    """

    token_ids: tuple[int, ...]
    text: str
    completion_tokens: int
    ttft_s: float | None
    total_s: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    base_tokens: int | None = None
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None where there are none."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1)


class OverloadedError(RuntimeError):
    """The server takes no more requests now.

    Attributes:
        retry_after_s: seconds after which to ask again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Client(Protocol):
    """Something that answers calls."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt that can ever be served with one response token; None where unknown."""
        ...

    async def generate(self, call: Call) -> Reply:
        """Send a call and wait for its whole response.

        A failure is a `Reply` with an error; cancelling the task ends the request.

        Raises:
            OverloadedError: refused for now.
        """
        ...

    async def end_session(self, session: str) -> None:
        """A session that did not come to its last call is over."""
        ...

    def stats(self) -> EngineStats | None:
        """The engine's counters and gauges; None where they cannot be had."""
        ...


class InProcessClient:
    """The engine in this process.

    Times are taken in the engine's thread as tokens appear, so that a busy event loop is not
    counted as latency.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._header = plain_header(engine.renderer)

    @property
    def max_prompt_tokens(self) -> int:
        """See `Client`."""
        return self._engine.max_prompt_tokens

    async def generate(self, call: Call) -> Reply:
        """See `Client`."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        seen: list[tuple[float, Event]] = []

        def sink(event: Event) -> None:
            seen.append((time.perf_counter(), event))
            if event.finish_reason is not None:
                loop.call_soon_threadsafe(_finish, ended)

        start = time.perf_counter()
        try:
            request = self._request(call)
            start = time.perf_counter()  # rendering is not the engine's time
            self._engine.submit(request, sink)
        except QueueFullError as error:
            raise OverloadedError(str(error), error.retry_after_s) from error
        except (DataError, ServingError, EngineStoppedError) as error:
            return Reply((), "", 0, None, time.perf_counter() - start, error=str(error))
        try:
            await ended
        except asyncio.CancelledError:
            self._engine.cancel(request.request_id)
            raise
        return _reply(start, seen)

    async def end_session(self, session: str) -> None:
        """See `Client`."""
        self._engine.end_session(session)

    def stats(self) -> EngineStats:
        """See `Client`."""
        return self._engine.stats()

    def _request(self, call: Call) -> GenerationRequest:
        renderer = self._engine.renderer
        if call.messages is None:
            ids: Sequence[int] = call.prompt_ids
            header = header_at_end(ids, self._header)
        else:
            messages = renderer.with_system_prompt([dict(m) for m in call.messages])
            ids, header = prompt_and_header(messages, renderer)
        return GenerationRequest(
            decoder=call.decoder,
            prompt_ids=tuple(ids),
            sampling=SamplingParams(max_tokens=call.max_tokens, ignore_eos=True),
            header_length=header,
            session=call.session,
            end_session=call.last,
        )


class ManagedEngine(EngineClient, Protocol):
    """An engine whose loop the load starts and stops."""

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        ...

    def stop(self) -> None:
        """Cancel what runs and end the thread."""
        ...


@contextlib.asynccontextmanager
async def in_process(engine: ManagedEngine) -> AsyncIterator[Client]:
    """An engine, running inside the block."""
    engine.start()
    try:
        yield InProcessClient(engine)
    finally:
        engine.stop()


def _finish(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _reply(start: float, seen: list[tuple[float, Event]]) -> Reply:
    tokens = [(at, event) for at, event in seen if event.token_ids]
    ended, last = seen[-1]
    usage = last.usage
    # An end without tokens comes after the last of them; latency is that of the tokens.
    end = tokens[-1][0] if tokens and last.finish_reason == "length" else ended
    error = None
    if last.finish_reason not in ("stop", "length"):
        error = last.error or str(last.finish_reason)
    return Reply(
        token_ids=tuple(token for _, event in tokens for token in event.token_ids),
        text="".join(event.text for _, event in seen),
        completion_tokens=sum(len(event.token_ids) for _, event in tokens),
        ttft_s=tokens[0][0] - start if tokens else None,
        total_s=end - start,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        base_tokens=usage.prompt_tokens - usage.decoder_prompt_tokens if usage else None,
        error=error,
    )
