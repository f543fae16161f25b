"""vLLM instances as an engine: what our server asks of one, answered by pools of them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from prefillshare_train.data import Renderer
from prefillshare_train.engines.vllm.router.answer import Answer, Shared
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.health import HealthMonitor, least_length
from prefillshare_train.engines.vllm.router.metrics import RouterMetrics
from prefillshare_train.engines.vllm.router.prompts import Prompting
from prefillshare_train.engines.vllm.router.replicas import Fleet
from prefillshare_train.engines.vllm.router.upstream import Upstream
from prefillshare_train.serving.api import (
    EngineStats,
    EngineStoppedError,
    Event,
    EventSink,
    GenerationRequest,
    QueueFullError,
    ServingError,
    Usage,
)
from prefillshare_train.serving.rate import EndRate

_LOG = logging.getLogger(__name__)
_IDLE_S = 0.02
_STOP_S = 10.0
_UNKNOWN_LENGTH = 1 << 20


@dataclass
class _Sums:
    """Sums over ended requests, as in `EngineStats`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, usage: Usage, prefill_s: float) -> None:
        """Count a request that has ended."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.prefilled_tokens += usage.prefilled_tokens
        self.completion_tokens += usage.completion_tokens
        self.prefill_seconds += prefill_s
        if usage.ttft_s is not None:
            self.decode_seconds += usage.total_s - usage.ttft_s


class VllmBackend:
    """Implements `EngineClient`; a context manager that runs its event loop in a thread of its own.

    Public methods may be called from any thread; sinks are called in the loop's.

    Attributes:
        metrics: by replica and decoder.
        fleet: the replicas.
    """

    def __init__(self, config: RouterConfig, prompting: Prompting) -> None:
        self.config = config
        self.fleet = Fleet(config)
        self.metrics = RouterMetrics(self.fleet)
        self._prompting = prompting
        self._live: dict[str, tuple[Answer, asyncio.Task[None]]] = {}
        self._reserved: set[str] = set()
        self._sums = _Sums()
        self._finished: dict[str, int] = {}
        self._rate = EndRate()
        self._lock = threading.Lock()
        self._accepting = True
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._shared: Shared

    # -- what the server uses ---------------------------------------------------------------

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the served decoders."""
        return tuple(self.config.decoders)

    @property
    def renderer(self) -> Renderer:
        """Makes the prompts of base and decoders."""
        return self._prompting.renderer

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that every replica can take, with one response token."""
        told = least_length(list(self.fleet.replicas.values()))
        known = [length for length in (told, self.config.max_model_len) if length is not None]
        return min(known, default=_UNKNOWN_LENGTH) - 1

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Start a request; its events go to `sink` until one has a finish reason.

        Raises:
            ServingError: it can never be served.
            QueueFullError: as many as may be are under way.
            EngineStoppedError: the router drains, or no replica takes requests for the decoder.
        """
        base_tokens = self._base_tokens(request)
        if (why := self.fleet.why_not(request.decoder)) is not None:
            raise EngineStoppedError(why)
        with self._lock:
            if not self._accepting:
                raise EngineStoppedError("the router is stopping and takes no more requests")
            if request.request_id in self._reserved:
                raise ServingError(f"a request called {request.request_id} is running")
            if len(self._reserved) >= self.config.max_running:
                raise QueueFullError(len(self._reserved), self._rate.seconds_to_the_next())
            self._reserved.add(request.request_id)
            # Under the lock, so that no cancel of this request can come before it.
            self._loop.call_soon_threadsafe(self._begin, request, base_tokens, sink)

    def cancel(self, request_id: str) -> None:
        """End a request and both its calls; unknown or ended ones are ignored."""
        self._in_loop(self._cancel, request_id)

    def end_session(self, session: str) -> None:
        """Forget where a session was prefilled."""
        self._in_loop(self.fleet.end_session, session)

    def stats(self) -> EngineStats:
        """Counters and gauges of now; blocks are what prefill replicas are thought to keep."""
        answers = [answer for answer, _ in list(self._live.values())]
        states = [answer.state for answer in answers]
        prefill = self.fleet.prefill
        alive = [replica for replica in prefill if replica.takes_requests]
        kept = sum(len(replica.kept) for replica in prefill)
        return EngineStats(
            waiting=states.count("waiting"),
            prefilling=states.count("prefilling"),
            decoding=states.count("decoding"),
            sessions=self.fleet.sessions,
            sessions_waiting=0,
            blocks_total=sum(replica.kept.max_blocks for replica in prefill),
            blocks_used=0,
            blocks_cached=kept,
            block_tokens=self.config.block_tokens,
            block_bytes=0,
            peak_kv_bytes=0,
            staged_blocks=0,
            staged_out_bytes=0,
            staged_in_bytes=0,
            evicted_blocks=0,
            retokenized_misses=0,
            decode_steps=0,
            decode_rows=0,
            finished=dict(self._finished),
            workers_alive=len(alive),
            workers_total=len(prefill),
            **dataclasses.asdict(self._sums),
        )

    # -- its thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        self._thread.start()
        self._ready.wait()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until those that run have ended; False on a timeout."""
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + timeout_s
        while self._reserved and time.monotonic() < deadline:
            time.sleep(_IDLE_S)
        return not self._reserved

    def stop(self) -> None:
        """Cancel what runs, and end the thread."""
        with self._lock:
            self._accepting = False
        self._in_loop(lambda: self._stopping.set())
        self._thread.join(_STOP_S)

    def __enter__(self) -> VllmBackend:
        self.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with Upstream(self.config) as upstream:
            self._shared = Shared(
                self.config, self.fleet, upstream, self.metrics, self.renderer.end_token_ids
            )
            monitor = HealthMonitor(self.config, self.fleet, self.metrics, upstream.client)
            watching = asyncio.create_task(monitor.run())
            self._ready.set()
            await self._stopping.wait()
            tasks = [watching, *(task for _, task in self._live.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, request: GenerationRequest, base_tokens: int, sink: EventSink) -> None:
        def tell(event: Event) -> None:
            if event.finish_reason is not None:
                if request.session is not None and request.end_session:
                    self.fleet.end_session(request.session)
                self._ended(event, answer)
            sink(event)

        def done(_: asyncio.Task[None]) -> None:
            self._live.pop(request.request_id, None)
            # A task that was cancelled before its first step has told nothing.
            answer.give_up()

        answer = Answer(self._shared, request, base_tokens, tell)
        task = self._loop.create_task(answer.run())
        self._live[request.request_id] = (answer, task)
        task.add_done_callback(done)

    def _cancel(self, request_id: str) -> None:
        if (found := self._live.get(request_id)) is not None:
            found[1].cancel()

    def _ended(self, event: Event, answer: Answer) -> None:
        assert event.usage is not None
        self._rate.note()
        self._sums.add(event.usage, answer.prefill_s)
        reason = str(event.finish_reason)
        self._finished[reason] = self._finished.get(reason, 0) + 1
        with self._lock:
            self._reserved.discard(event.request_id)

    def _base_tokens(self, request: GenerationRequest) -> int:
        rule = self._prompting.rules.get(request.decoder)
        if rule is None:
            raise ServingError(
                f"there is no decoder {request.decoder!r}; served are: {', '.join(self.decoders)}"
            )
        count = len(request.prompt_ids)
        if not 0 < count <= self.max_prompt_tokens:
            raise ServingError(
                f"the prompt has {count} tokens; 1 to {self.max_prompt_tokens} are served"
            )
        try:
            base_tokens = rule.base_length(count, request.header_length)
        except ValueError as error:
            raise ServingError(f"decoder {request.decoder}: {error}") from error
        if base_tokens < 0:
            raise ServingError(
                f"header_length {request.header_length} is more than the prompt's {count} tokens"
            )
        return base_tokens

    def _in_loop(self, call: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has been closed; nothing is left to end
            _LOG.debug("called after the end")
