"""A short soak in CI; `python -m tests.serving.soak --minutes 30` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.serving.soak import soak


def test_nothing_is_lost_wrong_or_left_over(served_folder: Path) -> None:
    result = soak(served_folder, seconds=45)
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
    assert not result.grows, result.memory
