"""Sessions with disconnects, cancels, evictions and a killed worker, for as long as asked.

    python -m tests.serving.soak --minutes 30

Checks, while it runs and at the end, that every answer that was not cut off is what `core.generate`
gives, that no block is lost, and that memory does not grow after the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.serving.served import DECODERS, Collector, Oracle, engine_of, load_served, save_served
from tests.serving.served import request as make_request
from tqdm import tqdm

from prefillshare_train.serving.api import GenerationRequest, QueueFullError
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.workers import PrefillReport

_SESSIONS = 24
_LONGEST = 120


@dataclass
class SoakResult:
    """What happened.

    Attributes:
        answered, cut_off: requests that ended by themselves, and that were cancelled.
        ties: answers that took the other of two tokens whose logits are equal to rounding.
        wrong: answers that differ from `core.generate` in any other way.
        evicted, staged: blocks.
        lost_blocks: blocks still held once nothing ran and no session was left.
        grown_mib: resident memory at the end, over that after the warm-up.
    """

    answered: int = 0
    cut_off: int = 0
    refused: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    evicted: int = 0
    staged: int = 0
    lost_blocks: int = 0
    grown_mib: float = 0.0


class _Soak:
    def __init__(self, engine: Engine, oracle: Oracle, seed: int) -> None:
        self.engine, self.oracle = engine, oracle
        self.chosen = random.Random(seed)
        self.contexts: dict[int, tuple[int, ...]] = {}
        self.flying: dict[str, tuple[GenerationRequest, Collector, bool]] = {}
        self.result = SoakResult()

    def send(self) -> None:
        """One more turn of a random session, or the first of a new one."""
        session = self.chosen.randrange(_SESSIONS)
        context = self.contexts.get(session, ())
        fresh = [self.chosen.randrange(10, 200) for _ in range(self.chosen.randrange(4, 24))]
        prompt = (*context, *fresh)
        ends = len(prompt) > _LONGEST or self.chosen.random() < 0.05
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
        cut = self.chosen.random() < 0.15
        self.flying[one.request_id] = (one, found, cut)

    def check(self) -> None:
        """Cancel some that run; compare those that have ended."""
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
        """Wait until nothing runs."""
        while self.flying:
            self.check()
            time.sleep(0.01)


def soak(folder: Path, seconds: float, seed: int = 0, *, progress: bool = False) -> SoakResult:
    """Run for so many seconds on the tiny models saved in `folder`."""
    models, oracle = load_served(folder), Oracle(folder)
    options = {"prefill_workers": 2, "session_tokens": 48, "session_idle_s": 0.5}
    process = psutil.Process()
    with engine_of(models, 160, staging_bytes=60_000, max_waiting=32, **options) as engine:
        run = _Soak(engine, oracle, seed)
        start, warm, killed = time.monotonic(), 0.0, False
        with tqdm(total=round(seconds), unit="s", disable=not progress) as bar:
            while (passed := time.monotonic() - start) < seconds:
                bar.update(int(passed) - bar.n)
                if len(run.flying) < 24:
                    run.send()
                run.check()
                if not warm and passed > seconds / 4:
                    run.settle()
                    oracle.forget()
                    gc.collect()
                    warm = process.memory_info().rss
                if not killed and passed > seconds / 2:
                    killed = True
                    engine._loop.receive(PrefillReport(0, 0.0, "killed by the soak", lost=True))
        run.settle()
        for session in range(_SESSIONS):
            engine.end_session(f"s{session}")
        time.sleep(0.3)
        stats = engine.stats()
        oracle.forget()
        gc.collect()
        run.result.grown_mib = (process.memory_info().rss - warm) / (1 << 20)
        run.result.lost_blocks = stats.blocks_used
        run.result.evicted = stats.evicted_blocks
        run.result.staged = stats.staged_in_bytes // stats.block_bytes
    return run.result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_served(Path(folder))
        print(soak(Path(folder), 60 * options.minutes, options.seed, progress=True))


if __name__ == "__main__":
    main()
