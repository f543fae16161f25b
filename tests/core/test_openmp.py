"""Threads that take turns leave no idle OpenMP workers behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them"
)
START = """
import os, time
import torch
from prefillshare_train.core.openmp import release_workers

def count():
    time.sleep(0.2)  # one that has ended is listed for a moment more
    return len(os.listdir("/proc/self/task"))

def work():
    torch.randn(1 << 20).mul_(2)
"""
RELEASE = """
before = count()
work()
busy = count()
release_workers()
print(busy - before, count() - before)
work()
print(count() - before)
"""
TURNS = """
from prefillshare_train.training.lockstep import Lockstep, generator_states

work()
turns = Lockstep(on_round=lambda: None)
counts = []

def task(name):
    def run():
        for _ in range(3):
            work()
            counts.append(count())
            turns.pass_on(name)
    return run

threads = count() - 1  # but the main thread's worker
turns.run({name: task(name) for name in "abc"}, {name: generator_states() for name in "abc"})
print(threads, max(counts))
"""
ENGINE = """
from prefillshare_train.serving.engine import Engine

class Still(Engine):
    def __init__(self):
        pass
    def _run(self):
        work()
        counts.append(count())

before, counts = count(), []
work()
engine = Still()
engine.start()
engine._thread.join()
print(counts[0] - before)
"""


def run(script: str) -> list[list[int]]:
    """What a script prints, in a process whose torch has two threads."""
    answer = subprocess.run(
        [sys.executable, "-c", START + script],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [[int(number) for number in line.split()] for line in answer.stdout.splitlines()]


def test_workers_end_and_come_back() -> None:
    assert run(RELEASE) == [[1, 0], [1]]


def test_trainers_in_turns_have_workers_one_at_a_time() -> None:
    ((threads, most),) = run(TURNS)
    assert most == threads + 3 + 1  # three tasks, and the worker of the one whose turn it is


def test_the_engines_thread_has_the_only_workers() -> None:
    assert run(ENGINE) == [[2]]  # the engine's thread and its worker
