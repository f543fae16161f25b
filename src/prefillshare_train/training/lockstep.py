"""Several trainers in one process that take turns, one micro-batch each.

Each runs in a thread of its own, and exactly one runs at a time, always in the same order. Random
generators are the process's, so each keeps its own states while others run: its numbers are those
of a run by itself.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from transformers import TrainerCallback

from prefillshare_train.core.openmp import release_workers

Result = TypeVar("Result")


class AnotherFailedError(RuntimeError):
    """Another of the trainers failed, so this one ends too."""


def generator_states() -> tuple[Any, ...]:
    """States of Python's, numpy's, torch's and CUDA's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda


def set_generator_states(states: tuple[Any, ...]) -> None:
    """Set what `generator_states` gave."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


class Lockstep(Generic[Result]):
    """Runs tasks in turns.

    Args:
        on_round: called between the last task's turn and the first's.
    """

    def __init__(self, on_round: Callable[[], None]) -> None:
        self._on_round = on_round
        self._condition = threading.Condition()
        self._ring: list[str] = []
        self._turn = ""
        self._error: BaseException | None = None

    def run(
        self,
        tasks: Mapping[str, Callable[[], Result]],
        states: Mapping[str, tuple[Any, ...]],
    ) -> dict[str, Result]:
        """Run every task to its end; tasks call `pass_on` where another may go on.

        Args:
            tasks: by name, in the order of their turns.
            states: generator states that each task begins with.

        Raises:
            BaseException: the first that a task raised; the others are ended.
        """
        results: dict[str, Result] = {}
        self._ring = list(tasks)
        self._turn = self._ring[0]
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def body(name: str) -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # the current device is each thread's own
                self._wait(name)
                set_generator_states(states[name])
                results[name] = tasks[name]()
            except AnotherFailedError:
                pass
            except BaseException as error:
                with self._condition:
                    self._error = self._error or error
            finally:
                release_workers()
                self._leave(name)

        threads = [threading.Thread(target=body, args=(name,), name=name) for name in tasks]
        release_workers()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return results

    def pass_on(self, name: str) -> None:
        """Let the next task run; returns at the caller's next turn.

        Raises:
            AnotherFailedError: another task failed meanwhile.
        """
        states = generator_states()
        release_workers()
        with self._condition:
            self._advance(name)
        self._wait(name)
        set_generator_states(states)

    def _advance(self, name: str) -> None:
        place = self._ring.index(name)
        following = (place + 1) % len(self._ring)
        if following == 0:
            self._on_round()
        self._turn = self._ring[following]
        self._condition.notify_all()

    def _leave(self, name: str) -> None:
        with self._condition:
            if self._turn == name and len(self._ring) > 1:
                self._advance(name)
            self._ring.remove(name)
            self._condition.notify_all()

    def _wait(self, name: str) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._turn == name or self._error is not None)
            if self._error is not None:
                raise AnotherFailedError


class TakeTurns(TrainerCallback):
    """Passes the turn on after every micro-batch."""

    def __init__(self, lockstep: Lockstep[Any], name: str) -> None:
        self._lockstep = lockstep
        self._name = name

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._lockstep.pass_on(self._name)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._lockstep.pass_on(self._name)
