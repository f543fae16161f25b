"""A grid of load points from start to report: what `prefillshare bench` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.driver import LoadResult
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.files import write_json, write_text
from prefillshare_train.workloads.lengths import BUILT_IN, Lengths, lengths_from_traces
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.plots import plot_loads
from prefillshare_train.workloads.points import (
    Bench,
    ClientFactory,
    LoadPoint,
    PointStore,
    Workload,
)
from prefillshare_train.workloads.report import markdown, rows_of
from prefillshare_train.workloads.reuse import requests_of, work_of
from prefillshare_train.workloads.sessions import Session
from prefillshare_train.workloads.trace import write_trace


@dataclass(frozen=True)
class Grid:
    """Loads that differ in mode, arrival rate and cap on sessions.

    Attributes:
        workload: its name, for reports.
        modes, rates, caps: every combination is run; modes alternate innermost, so that a slow
            change of the machine meets both.
        decoders: number of them.
        sessions, warm_up, repeats: of each load.
        kv_bytes, staging_bytes, session_tokens: of `EngineConfig`.
        regimes: by cap, see `regime_of`; `unknown` where a cap has none.
    """

    workload: str
    modes: Sequence[Mode]
    rates: Sequence[float | None]
    caps: Sequence[int]
    decoders: int
    sessions: int
    warm_up: int
    repeats: int
    kv_bytes: int
    staging_bytes: int = 0
    session_tokens: int = 0
    regimes: Mapping[int, str] = field(default_factory=dict)

    def points(self) -> list[LoadPoint]:
        """All load points, in the order in which they are run."""
        return [
            LoadPoint(
                experiment="bench",
                workload=self.workload,
                regime=self.regimes.get(cap, "unknown"),
                mode=mode,
                decoders=self.decoders,
                sessions_per_s=rate,
                max_sessions=cap,
                sessions=self.sessions,
                warm_up=self.warm_up,
                kv_bytes=self.kv_bytes,
                staging_bytes=self.staging_bytes,
                session_tokens=self.session_tokens,
                repeat=repeat,
            )
            for repeat in range(self.repeats)
            for rate in self.rates
            for cap in self.caps
            for mode in self.modes
        ]


def run_grid(
    grid: Grid,
    workload: Workload,
    client_of: ClientFactory,
    out: Path,
    store: PointStore,
    *,
    objectives: Objectives,
    fixed_context: bool = True,
    timeout_s: float = 600.0,
    record: Path | None = None,
) -> str:
    """Run what is not finished, and write `bench.json`, `bench.md` and plots into `out`.

    Args:
        store: where finished loads lie.
        record: write the first load that is run as a trace.

    Returns:
        The tables.

    Raises:
        WorkloadError: a trace is wanted, and all loads were finished before.
    """
    recorded: list[LoadPoint] = []

    def keep_trace(point: LoadPoint, result: LoadResult) -> None:
        if record is not None and not recorded:
            write_trace(record, result)
            recorded.append(point)

    bench = Bench(
        workload_of=lambda point: workload,
        client_of=client_of,
        store=store,
        objectives=objectives,
        fixed_context=fixed_context,
        timeout_s=timeout_s,
        on_result=keep_trace,
    )
    points = grid.points()
    if record is not None and not bench.unfinished(points):
        raise WorkloadError(
            f"--record {record}: a trace is written of a load that is run, and all {len(points)} "
            f"were finished in {out} before. Give another --out, or leave --record out"
        )
    rows = rows_of(bench.run(points))
    limits = f"TTFT within {objectives.ttft_s:g} s and TPOT within {objectives.tpot_s:g} s"
    write_json(out / "bench.json", rows)
    tables = markdown(rows, limits)
    write_text(out / "bench.md", tables)
    plot_loads(rows, out, "bench")
    return tables


def regime_of(sessions: Sequence[Session], at_once: int, kv_bytes: int, token_bytes: int) -> str:
    """Whether memory limits the isolated side of a load.

    Args:
        sessions: of the load, of which the longest `at_once` are taken to run together.
        kv_bytes: budget for K/V.
        token_bytes: K/V bytes of one token.

    Returns:
        `memory` where the budget is less than what the isolated side holds then: each decoder's own
        copy of all prompts that it is sent, and a response of each session. `compute` otherwise,
        and `unknown` where prompts are messages, whose tokens are not counted here.
    """
    if any(turn.messages is not None for session in sessions for turn in session.turns):
        return "unknown"
    together = sorted(sessions, key=lambda session: session.tokens, reverse=True)[:at_once]
    prompts = work_of(requests_of(together), "isolated").prefill_tokens
    responses = sum(max(turn.max_tokens for turn in session.turns) for session in together)
    return "memory" if kv_bytes < (prompts + responses) * token_bytes else "compute"


def choose_lengths(folder: Path | None, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Lengths of the trajectories in a folder, or the built-in ones where none is given."""
    if folder is None:
        return BUILT_IN

    def count(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [len(ids) for ids in encoded]

    return lengths_from_traces(folder, count)


def numbers(
    text: str, option: str, kind: Callable[[str], Any] = int, *, words: dict[str, Any] | None = None
) -> list[Any]:
    """Read numbers with commas.

    Args:
        option: for the message of an error.
        words: values that are written as words.

    Raises:
        WorkloadError: one is neither a number above 0 nor such a word.
    """
    found = []
    for part in text.split(","):
        word = part.strip()
        if words and word in words:
            found.append(words[word])
            continue
        try:
            value = kind(word)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            also = "".join(f" or {name}" for name in words or ())
            raise WorkloadError(f"{option} {text}: {word!r} is not a number above 0{also}")
        found.append(value)
    return found
