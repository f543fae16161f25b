"""Load points: each is run once, whatever happens to the process, and its figures are kept."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.client import Client
from prefillshare_train.workloads.driver import DriverOptions, LoadResult, drive
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine
from prefillshare_train.workloads.metrics import Figures, Objectives, figures
from prefillshare_train.workloads.reuse import Sent, Work, work_of
from prefillshare_train.workloads.sessions import Session, SessionPlan, poisson_arrivals

# Warm-up sessions are drawn from far behind the measured ones, so that the two share nothing but
# the system prompt.
_WARM_UP_FIRST = 1_000_000


@dataclass(frozen=True)
class LoadPoint:
    """One load on one system.

    Attributes:
        experiment: what it is part of.
        workload: name of the workload.
        regime: `compute` (the K/V budget holds all that both sides need), `memory`, or `unknown`.
        mode: `shared` or `isolated`.
        decoders: number of them.
        sessions_per_s: Poisson arrivals; None lets all sessions arrive at once.
        max_sessions: sessions that run at once.
        sessions: measured sessions; `warm_up`: those before them.
        kv_bytes, staging_bytes, session_tokens: of `EngineConfig`.
        variant: what sets it apart in experiments that vary something else.
        repeat: number of the repetition.
    """

    experiment: str
    workload: str
    regime: str
    mode: Mode
    decoders: int
    sessions_per_s: float | None
    max_sessions: int
    sessions: int
    warm_up: int = 0
    kv_bytes: int = 0
    staging_bytes: int = 0
    session_tokens: int = 0
    variant: str = ""
    repeat: int = 0

    @property
    def label(self) -> str:
        """For progress bars and file names."""
        rate = "all" if self.sessions_per_s is None else f"{self.sessions_per_s:.3g}"
        parts = [self.experiment, self.workload, self.regime, self.variant, self.mode]
        parts += [f"d{self.decoders}", f"r{rate}", f"s{self.max_sessions}", f"n{self.repeat}"]
        return "-".join(part.replace("/", "x").replace(" ", "_") for part in parts if part)


class Workload(Protocol):
    """Where the sessions of a load come from."""

    def sessions(self, point: LoadPoint) -> list[Session]:
        """Measured sessions with their arrival times."""
        ...

    def warm_up(self, point: LoadPoint) -> list[Session]:
        """Sessions that run before them."""
        ...


@dataclass(frozen=True)
class DrawnWorkload:
    """Sessions drawn from a plan, for the first `point.decoders` of its decoders."""

    plan: SessionPlan

    def sessions(self, point: LoadPoint) -> list[Session]:
        """See `Workload`."""
        drawn = self._plan(point).sessions(point.sessions)
        return poisson_arrivals(drawn, point.sessions_per_s, self.plan.seed)

    def warm_up(self, point: LoadPoint) -> list[Session]:
        """See `Workload`."""
        return self._plan(point).sessions(point.warm_up, first=_WARM_UP_FIRST)

    def _plan(self, point: LoadPoint) -> SessionPlan:
        return dataclasses.replace(self.plan, decoders=self.plan.decoders[: point.decoders])


@dataclass(frozen=True)
class RecordedWorkload:
    """The sessions of a trace, at their own times and without a warm-up."""

    recorded: Sequence[Session]

    @property
    def sessions_per_s(self) -> float | None:
        """Rate at which its sessions arrive; None where all arrive at once."""
        times = [session.at_s for session in self.recorded]
        span = max(times) - min(times)
        return (len(times) - 1) / span if span else None

    def sessions(self, point: LoadPoint) -> list[Session]:
        """See `Workload`."""
        return list(self.recorded)

    def warm_up(self, point: LoadPoint) -> list[Session]:
        """See `Workload`."""
        return []


ClientFactory = Callable[[LoadPoint], AbstractAsyncContextManager[Client]]
"""Makes a fresh system for a load point, so that no cache is left over from the one before."""


class PointStore:
    """A folder with one file a finished load point.

    A file's name holds a digest of the point, of `setup`, of the machine and of the engine's code:
    anything else is another file, and a finished one is never run again.

    Args:
        setup: all else that shapes the figures (model, dtype, lengths, seeds), as JSON values.
        device: that is computed on, see `machine`.
        server_start: names the start of the server that is measured; points of another start are
            run again, in their files' place. None where there is none, or for whatever start.

    Attributes:
        machine: in words.
    """

    def __init__(
        self,
        folder: Path,
        setup: dict[str, Any],
        *,
        device: str | None = None,
        server_start: str | None = None,
    ) -> None:
        self._folder = folder
        self._server_start = server_start
        self.machine = machine(device)
        self._setup = {**setup, "machine": self.machine, "code": _code_fingerprint()}

    @property
    def where(self) -> str:
        """The machine and, where the setup names one, the dtype, in words."""
        return ", ".join([self.machine, *filter(None, [self._setup.get("dtype")])])

    def also(self, setup: dict[str, Any]) -> PointStore:
        """The same folder, where more shapes the figures."""
        # The code's fingerprint stays that of the code that was loaded.
        other = copy.copy(self)
        other._setup = {**self._setup, **setup}
        return other

    def path(self, point: LoadPoint) -> Path:
        """The point's file."""
        identity = json.dumps([dataclasses.asdict(point), self._setup], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        return self._folder / f"{point.label}-{digest}.json"

    def read(self, point: LoadPoint) -> Figures | None:
        """Figures of a finished point; None where it is not finished."""
        path = self.path(point)
        if not path.is_file():
            return None
        held = json.loads(path.read_text())
        if self._server_start not in (None, held["server_start"]):
            return None
        found: Figures = held["figures"]
        return found

    def write(self, point: LoadPoint, found: Figures, result: LoadResult) -> None:
        """Keep a point's figures and its records: complete or not at all."""
        value = {
            "point": dataclasses.asdict(point),
            "setup": self._setup,
            "server_start": self._server_start,
            "figures": found,
            "sessions": [dataclasses.asdict(session) for session in result.sessions],
            "requests": [dataclasses.asdict(request) for request in result.requests],
        }
        write_json(self.path(point), value)


@dataclass(frozen=True)
class Bench:
    """Runs load points.

    Attributes:
        workload_of: the workload of a point.
        client_of: the system that it is run on.
        store: where finished points lie.
        objectives: limits of a good request.
        fixed_context, timeout_s: see `DriverOptions`.
        on_result: given the result of every point that is run.
    """

    workload_of: Callable[[LoadPoint], Workload]
    client_of: ClientFactory
    store: PointStore
    objectives: Objectives = field(default_factory=Objectives)
    fixed_context: bool = True
    timeout_s: float = 600.0
    on_result: Callable[[LoadPoint, LoadResult], object] = lambda point, result: None

    def run(self, points: Iterable[LoadPoint]) -> dict[LoadPoint, Figures]:
        """Figures of all points, in their order; finished ones are only read."""
        planned = list(points)
        found: dict[LoadPoint, Figures] = {}
        stores = {point: self._kept(point) for point in planned}
        calls = {p: self._calls(p) for p in planned if stores[p].read(p) is None}
        with tqdm(total=sum(calls.values()), unit="call", dynamic_ncols=True) as bar:
            for point in planned:
                held = stores[point].read(point)
                if held is None:
                    bar.set_description(point.label)
                    held = self._run(point, stores[point], bar)
                found[point] = held
        return found

    def unfinished(self, points: Iterable[LoadPoint]) -> list[LoadPoint]:
        """Those that `run` would run."""
        return [point for point in points if self._kept(point).read(point) is None]

    def _calls(self, point: LoadPoint) -> int:
        workload = self.workload_of(point)
        sessions = [*workload.warm_up(point), *workload.sessions(point)]
        return sum(len(session.turns) for session in sessions)

    def _run(self, point: LoadPoint, store: PointStore, bar: tqdm[Any]) -> Figures:
        workload = self.workload_of(point)
        options = DriverOptions(point.max_sessions, self.fixed_context, self.timeout_s)
        warm, result = asyncio.run(
            _drive_both(self.client_of, workload, point, options, lambda: bar.update(1))
        )
        found = figures(result, _work(warm.sent, result.sent), self.objectives)
        found["machine"] = store.where
        store.write(point, found, result)
        self.on_result(point, result)
        return found

    def _kept(self, point: LoadPoint) -> PointStore:
        """Where its figures lie; a trace under a known name may hold other sessions than before."""
        workload = self.workload_of(point)
        asked = repr((workload.warm_up(point), workload.sessions(point)))
        setup = {
            "objectives": dataclasses.asdict(self.objectives),
            "fixed_context": self.fixed_context,
            "timeout_s": self.timeout_s,
            "sessions": hashlib.sha256(asked.encode()).hexdigest(),
        }
        return self.store.also(setup)


async def _drive_both(
    client_of: ClientFactory,
    workload: Workload,
    point: LoadPoint,
    options: DriverOptions,
    on_call: Callable[[], object],
) -> tuple[LoadResult, LoadResult]:
    async with client_of(point) as client:
        _check_lengths(workload.sessions(point), client.max_prompt_tokens)
        warm = await drive(client, workload.warm_up(point), options, on_call)
        if errors := [request.error for request in warm.requests if request.error]:
            raise WorkloadError(
                f"{point.label}: {len(errors)} calls of the warm-up failed, the first with: "
                f"{errors[0]}"
            )
        return warm, await drive(client, workload.sessions(point), options, on_call)


def _code_fingerprint() -> str:
    """SHA-256 of the sources that a load runs through, so that figures of old code are not kept."""
    package = Path(__file__).resolve().parents[1]
    hasher = hashlib.sha256()
    for part in ("core", "data", "serving", "workloads"):
        for path in sorted((package / part).rglob("*.py")):
            hasher.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def _check_lengths(sessions: Sequence[Session], limit: int | None) -> None:
    longest = max(sessions, key=lambda session: session.tokens)
    if limit is not None and longest.tokens > limit:
        raise WorkloadError(
            f"session {longest.name} grows to {longest.tokens} tokens; the engine takes {limit}. "
            "Lower the tokens of system prompt or context, or raise the K/V budget"
        )


def _work(before: list[Sent], sent: list[Sent]) -> dict[str, Work] | None:
    """None where prompts were messages, whose token ids the load does not know."""
    if not all(request.prompt_ids for request in sent):
        return None
    modes: tuple[Mode, ...] = ("shared", "isolated")
    return {mode: work_of(sent, mode, before) for mode in modes}
