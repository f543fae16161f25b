"""A short soak in CI; `python -m tests.serving.soak --minutes 30` is the long one."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tests.serving.soak import soak


def test_nothing_is_lost_wrong_or_left_over(
    served_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's objects are then the C library's, which counts what is not freed.
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    # In a process of its own: this one's memory moves with what other tests left in it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        result = process.submit(soak, served_folder, seconds=45).result()
    assert result.wrong == []
    assert result.lost_blocks == 0
    assert result.alive == 1
    assert result.answered > 100
    assert result.cut_off > 5
    assert result.hung_up > 5
    assert result.noticed > 5
    assert result.evicted > 0
    assert result.staged > 0
    assert result.left_over == 0
    assert not result.leaks, result.live
