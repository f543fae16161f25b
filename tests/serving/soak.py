"""Sessions with disconnects, cancels, evictions and a killed worker, for as long as asked.

    python -m tests.serving.soak --minutes 30

Requests go to the engine, and to a server over it whose clients hang up. Checks, while it runs and
at the end, that every answer that was not cut off is what `core.generate` gives, that no block is
lost, and that memory does not grow with the requests. Prefill workers are processes, of which one
is killed half-way; `--threads` makes them threads, as CI has it.

Memory is watched twice. Resident bytes, of all processes, are what an operator sees; within a
minute they move by many MiB as the C library's arenas do. Live bytes are what is allocated and not
freed, in this process alone, and do not move with the machine's load; PYTHONMALLOC=malloc, which
the command sets for itself, has Python's objects counted among them. They need glibc 2.33 or later.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from tests.serving.served import DECODERS, Collector, Oracle, engine_of, load_served, save_served
from tests.serving.served import request as make_request
from tests.serving.server.serving import Served, serve
from tqdm import tqdm

from prefillshare_train.serving.api import GenerationRequest, QueueFullError
from prefillshare_train.serving.disaggregated import ProcessWorker
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.sequence import Sequence
from prefillshare_train.serving.workers import PrefillReport

_SESSIONS = 24
_LONGEST = 120
_IDLE_S = 0.5
_PATIENCE = 5
"""Times its length that a soak goes on on a slow machine, until enough has happened."""
_GROWN_BYTES = 512
"""A request may leave so many behind; one that is kept whole has several thousand."""
_RESIDENT_WAVER_BYTES = 8 << 20
"""The allocator's own steps, which do not come again with further requests."""
_LIVE_WAVER_BYTES = 1 << 19
"""What threads hold back for their next allocations, and tables that double."""


@dataclass
class SoakResult:
    """What happened.

    Attributes:
        answered, cut_off: requests that ended by themselves, and that were cancelled.
        hung_up: clients of the server that left before their answer; `noticed` by the server.
        ties: answers that took the other of two tokens whose logits are equal to rounding.
        wrong: answers that differ from `core.generate` in any other way.
        evicted, staged: blocks.
        lost_blocks: blocks still held once nothing ran and no session was left: just before the
            worker was killed, its own among them, and at the end.
        alive: prefill workers at the end.
        resident: (requests so far, resident bytes) at rest, from the end of the warm-up on.
        live: the same of bytes that are allocated and not freed; see `live_bytes`.
        left_over: most requests that were in memory at rest.
    """

    answered: int = 0
    cut_off: int = 0
    hung_up: int = 0
    noticed: int = 0
    refused: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    evicted: int = 0
    staged: int = 0
    lost_blocks: int = 0
    alive: int = 0
    resident: list[tuple[int, int]] = field(default_factory=list)
    live: list[tuple[int, int]] = field(default_factory=list)
    left_over: int = 0

    @property
    def lacks_evidence(self) -> bool:
        """Whether too little has happened yet to prove anything."""
        return self.answered <= 100 or min(self.cut_off, self.hung_up) <= 10

    @property
    def grows(self) -> bool:
        """Whether resident memory grows with the requests; a minute is too short to tell."""
        return _grows(self.resident, _RESIDENT_WAVER_BYTES)

    @property
    def leaks(self) -> bool:
        """Whether live memory grows with the requests."""
        return _grows(self.live, _LIVE_WAVER_BYTES)


def bytes_per_request(memory: list[tuple[int, int]]) -> float:
    """Slope of the line through (requests, bytes)."""
    requests, held = np.array(memory, dtype=float).T
    return float(np.polyfit(requests, held, 1)[0])


def _grows(memory: list[tuple[int, int]], waver: int) -> bool:
    requests = memory[-1][0] - memory[0][0]
    return bytes_per_request(memory) > _GROWN_BYTES + waver / requests


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def live_bytes() -> int:
    """Bytes allocated and not freed, over all arenas of the C library and its mapped blocks.

    Objects of Python's own allocator are among them where PYTHONMALLOC=malloc.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


class _Soak:
    def __init__(self, engine: Engine, server: Served, oracle: Oracle, seed: int) -> None:
        self.engine, self.server, self.oracle = engine, server, oracle
        self.chosen = random.Random(seed)
        self.contexts: dict[int, tuple[int, ...]] = {}
        self.flying: dict[str, tuple[GenerationRequest, Collector, bool]] = {}
        self.leaving: list[Future[None]] = []
        self.clients = ThreadPoolExecutor(4, thread_name_prefix="clients")
        self.sent = 0
        self.result = SoakResult()

    def send(self) -> None:
        """One more turn of a random session, or the first of a new one."""
        session = self.chosen.randrange(_SESSIONS)
        context = self.contexts.get(session, ())
        fresh = [self.chosen.randrange(10, 200) for _ in range(self.chosen.randrange(4, 24))]
        prompt = (*context, *fresh)
        ends = len(prompt) > _LONGEST or self.chosen.random() < 0.05
        self.sent += 1
        if self.chosen.random() < 0.1:
            self.leaving.append(self.clients.submit(self.hang_up, prompt, self.chosen.random()))
            return
        one = make_request(
            self.chosen.choice([*DECODERS, "base"]),
            prompt,
            self.chosen.randrange(1, 9),
            session=f"s{session}",
            end_session=ends,
            cache_salt=self.chosen.choice([None, None, "tenant"]),
        )
        self.contexts[session] = () if ends else prompt
        found = Collector()
        try:
            self.engine.submit(one, found)
        except QueueFullError:
            self.result.refused += 1
            return
        cut = self.chosen.random() < 0.1
        self.flying[one.request_id] = (one, found, cut)

    def hang_up(self, prompt: tuple[int, ...], chance: float) -> None:
        """Ask the server for a long answer, and leave at some time before its end."""
        body = {"model": "math", "prompt": list(prompt), "max_tokens": 200, "ignore_eos": True}
        body |= {"session_id": f"gone{chance}"}
        patience = httpx.Timeout(20, read=None if chance < 0.5 else 0.1 * chance)
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.Client(base_url=self.server.http.base_url, timeout=patience) as client,
        ):
            if chance >= 0.5:
                client.post("/v1/completions", json=body)
                return
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                next(answer.iter_lines(), None)

    def check(self) -> None:
        """Cancel some that run; compare those that have ended."""
        for future in [future for future in self.leaving if future.done()]:
            future.result()
            self.leaving.remove(future)
            self.result.hung_up += 1
        for name, (one, found, cut) in list(self.flying.items()):
            if not found.done(name):
                if cut and self.chosen.random() < 0.3:
                    self.engine.cancel(name)
                continue
            del self.flying[name]
            answer = found.generation(name)
            expected = self.oracle.answer(one.decoder, one.prompt_ids, one.sampling.max_tokens)
            if answer.finish_reason == "cancelled":
                self.result.cut_off += 1
                expected = expected[: len(answer.token_ids)]
            else:
                self.result.answered += 1
            if list(answer.token_ids) == expected:
                continue
            if self.oracle.is_tie(one.decoder, one.prompt_ids, answer.token_ids):
                self.result.ties += 1
            else:
                self.result.wrong.append(f"{one.decoder}: {answer.token_ids} for {expected}")

    def settle(self) -> None:
        """Wait until nothing runs and no session is left; blocks that are held then are lost."""
        deadline = time.monotonic() + 120
        while self.flying or self.leaving or self._running():
            assert time.monotonic() < deadline, self.engine.stats()
            self.check()
            time.sleep(0.01)
        for session in range(_SESSIONS):
            self.engine.end_session(f"s{session}")
        self.contexts.clear()
        # Sessions of clients that left end by themselves, and what one sent may come in after it.
        time.sleep(3 * _IDLE_S)
        self.result.lost_blocks += _once_at_rest(lambda: self.engine.stats().blocks_used)

    def _running(self) -> int:
        stats = self.engine.stats()
        return stats.waiting + stats.prefilling + stats.decoding

    def look_at_memory(self, processes: list[psutil.Process]) -> None:
        """At rest, with what was freed given back."""
        self.settle()
        self.oracle.forget()
        self.result.left_over = max(self.result.left_over, _once_at_rest(self._in_memory))
        ctypes.CDLL(None).malloc_trim(0)
        resident = sum(process.memory_info().rss for process in processes)
        self.result.resident.append((self.sent, resident))
        self.result.live.append((self.sent, live_bytes()))

    def _in_memory(self) -> int:
        gc.collect()
        return sum(isinstance(thing, Sequence) for thing in gc.get_objects())

    def kill_a_worker(self) -> None:
        """In the middle of its work; what it had lost before is counted first."""
        self.settle()
        for _ in range(12):
            self.send()
        worker = self.engine._loop.workers[0]
        if isinstance(worker, ProcessWorker):
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
        else:
            lost = PrefillReport(0, 0.0, "killed by the soak", lost=True)
            self.engine._loop.receive(lost)


def _once_at_rest(count: Callable[[], int]) -> int:
    """A count that falls to 0 unless something is lost; what is left of it after a while."""
    deadline = time.monotonic() + 20
    while (left := count()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def soak(
    folder: Path,
    seconds: float,
    seed: int = 0,
    *,
    disaggregated: bool = False,
    looks: int = 4,
    progress: bool = False,
) -> SoakResult:
    """Run for so many seconds on the tiny models saved in `folder`.

    Args:
        disaggregated: prefill workers are processes.
        looks: at memory, from a quarter of the time on; all waits for nothing to run then.
    """
    with _running(folder, seed, disaggregated) as run:
        engine = run.engine
        processes = [psutil.Process()]
        if isinstance(survivor := engine._loop.workers[1], ProcessWorker):
            processes.append(psutil.Process(survivor.process.pid))
        start, killed = time.monotonic(), False
        times = [seconds * (0.25 + 0.75 * n / looks) for n in range(looks)]
        with tqdm(total=round(seconds), unit="s", disable=not progress) as bar:
            while (passed := time.monotonic() - start) < seconds or (
                run.result.lacks_evidence and passed < _PATIENCE * seconds
            ):
                bar.update(int(passed) - bar.n)
                if len(run.flying) + len(run.leaving) < 24:
                    run.send()
                run.check()
                if times and passed > times[0]:
                    times.pop(0)
                    run.look_at_memory(processes)
                if not killed and passed > seconds / 2:
                    killed = True
                    run.kill_a_worker()
        run.look_at_memory(processes)
        stats = engine.stats()
        run.result.alive = stats.workers_alive
        run.result.evicted = stats.evicted_blocks
        run.result.staged = stats.staged_in_bytes // stats.block_bytes
        metrics = run.server.http.get("/metrics").text.splitlines()
        [noticed] = [line for line in metrics if line.startswith("prefillshare_clients_gone_total")]
        run.result.noticed = round(float(noticed.split()[1]))
    return run.result


@contextlib.contextmanager
def _running(folder: Path, seed: int, disaggregated: bool) -> Iterator[_Soak]:
    models, oracle = load_served(folder), Oracle(folder)
    options = {"prefill_workers": 2, "session_tokens": 48, "session_idle_s": _IDLE_S}
    options |= {"staging_bytes": 60_000, "max_waiting": 32, "disaggregated": disaggregated}
    with engine_of(models, 200, **options) as engine, serve(engine) as server:
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
        run = _Soak(engine, server, oracle, seed)
        with run.clients:
            yield run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", action="store_true", help="prefill workers are threads")
    options = parser.parse_args()
    if os.environ.get("PYTHONMALLOC") != "malloc":
        command = [sys.executable, "-m", "tests.serving.soak", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONMALLOC": "malloc"})
    with tempfile.TemporaryDirectory() as folder:
        save_served(Path(folder))
        found = soak(
            Path(folder),
            60 * options.minutes,
            options.seed,
            disaggregated=not options.threads,
            looks=max(4, round(options.minutes)),
            progress=True,
        )
    grown = bytes_per_request(found.live), bytes_per_request(found.resident)
    print(found, "bytes a request: {:.0f} live, {:.0f} resident".format(*grown), sep="\n")
    if found.wrong or found.lost_blocks or found.left_over or found.grows or found.leaks:
        raise SystemExit("FAILED: something is wrong, lost, left over or growing; see above")


if __name__ == "__main__":
    main()
