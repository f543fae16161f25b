"""The load: sessions arrive, their calls follow one another, and every call is timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefillshare_train.serving.api import EngineStats
from prefillshare_train.workloads.client import Call, Client, OverloadedError, Reply
from prefillshare_train.workloads.reuse import Sent
from prefillshare_train.workloads.sessions import Session, TokenIds, Turn


@dataclass(frozen=True)
class DriverOptions:
    """How sessions are driven.

    Attributes:
        max_sessions: sessions that run at once; those that arrive beyond them wait.
        fixed_context: later prompts hold scripted tokens in place of each response, as many as it
            has. The default, so that both modes, all concurrencies and other servers are given the
            very same token ids, whatever rounding does to a greedy choice; the engine's work is the
            same, since the base prefills a response as new tokens, whoever wrote it.
        timeout_s: after which a call is given up.
        max_retries: times that a refused call is sent again, each after the time that the server
            asked for; the waits are part of its latency.
    """

    max_sessions: int
    fixed_context: bool = True
    timeout_s: float = 600.0
    max_retries: int = 50


@dataclass(frozen=True)
class RequestRecord:
    """One call as the client saw it; times in seconds from the start of the load."""

    session: str
    turn: int
    decoder: str
    start_s: float
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    completion_tokens: int
    prompt_tokens: int | None
    base_tokens: int | None
    cached_tokens: int | None
    retries: int
    error: str | None


@dataclass(frozen=True)
class SessionRecord:
    """One session; times in seconds from the start of the load.

    Attributes:
        at_s: when it arrived; `start_s`: when it was let in; `end_s`: when its last call ended.
        turns: calls that ended well; `error`: why there are not all of them.
    """

    name: str
    at_s: float
    start_s: float
    end_s: float
    turns: int
    error: str | None


@dataclass
class LoadResult:
    """What a load gave.

    Attributes:
        requests, sessions: in order of their ends.
        sent: every prompt, one a request, for the workload's own limits.
        duration_s: from the first arrival to the last end.
        before, after: the engine's statistics around the load; None where unknown.
    """

    requests: list[RequestRecord] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    duration_s: float = 0.0
    before: EngineStats | None = None
    after: EngineStats | None = None


async def drive(
    client: Client,
    sessions: Sequence[Session],
    options: DriverOptions,
    on_call: Callable[[], object] = lambda: None,
) -> LoadResult:
    """Run sessions to their ends.

    Args:
        on_call: told of every call that ended or will not be made any more.
    """
    result = LoadResult(before=client.stats())
    start = time.perf_counter()
    first = min((session.at_s for session in sessions), default=0.0)
    run = _Run(client, options, result, start - first, on_call)
    async with asyncio.TaskGroup() as tasks:
        # Tasks start in this order and a semaphore is fair: sessions are let in as they arrived.
        for session in sorted(sessions, key=lambda s: s.at_s):
            tasks.create_task(run.session(session))
    result.duration_s = time.perf_counter() - start
    result.after = client.stats()
    return result


class _Run:
    def __init__(
        self,
        client: Client,
        options: DriverOptions,
        result: LoadResult,
        zero: float,
        on_call: Callable[[], object],
    ) -> None:
        self._client = client
        self._options = options
        self._result = result
        self._zero = zero
        self._on_call = on_call
        self._places = asyncio.Semaphore(options.max_sessions)

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    async def session(self, session: Session) -> None:
        await asyncio.sleep(session.at_s - self._now())
        async with self._places:
            start = self._now()
            responses: list[TokenIds] = []
            error: str | None = None
            for number, turn in enumerate(session.turns):
                await asyncio.sleep(start + turn.not_before_s - self._now())
                reply = await self._turn(session, number, turn, responses)
                self._on_call()
                if reply.error is not None:
                    error = reply.error
                    await self._client.end_session(session.name)
                    for _ in session.turns[number + 1 :]:
                        self._on_call()
                    break
                fixed = self._options.fixed_context
                responses.append(turn.scripted if fixed else reply.token_ids)
            self._result.sessions.append(
                SessionRecord(session.name, session.at_s, start, self._now(), len(responses), error)
            )

    async def _turn(
        self, session: Session, number: int, turn: Turn, responses: list[TokenIds]
    ) -> Reply:
        call = Call(
            session.name,
            turn.decoder,
            turn.prompt_ids(responses),
            turn.max_tokens,
            turn.messages,
            last=number == len(session.turns) - 1,
        )
        start = self._now()
        reply, waited, retries = await self._send(call)
        self._result.sent.append(
            Sent(call.decoder, call.prompt_ids, reply.base_tokens, turn.max_tokens)
        )
        self._result.requests.append(
            RequestRecord(
                session=session.name,
                turn=number,
                decoder=turn.decoder,
                start_s=start,
                ttft_s=None if reply.ttft_s is None else waited + reply.ttft_s,
                tpot_s=reply.tpot_s,
                total_s=waited + reply.total_s,
                completion_tokens=reply.completion_tokens,
                prompt_tokens=reply.prompt_tokens,
                base_tokens=reply.base_tokens,
                cached_tokens=reply.cached_tokens,
                retries=retries,
                error=reply.error,
            )
        )
        return reply

    async def _send(self, call: Call) -> tuple[Reply, float, int]:
        """The reply, the seconds before the attempt that it came from, and the refusals."""
        first = self._now()
        retries = 0
        while True:
            waited = self._now() - first
            try:
                async with asyncio.timeout(self._options.timeout_s - waited):
                    return await self._client.generate(call), waited, retries
            except OverloadedError as error:
                retries += 1
                if retries > self._options.max_retries:
                    return _failure(str(error)), self._now() - first, retries
                await asyncio.sleep(error.retry_after_s)
            except TimeoutError:
                message = f"no whole response within {self._options.timeout_s:g} s"
                return _failure(message), self._now() - first, retries


def _failure(message: str) -> Reply:
    return Reply((), "", 0, None, 0.0, error=message)
