"""`make bench-train`: which rows are taken again, and which are measured anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [{"method": "sft", "ratio_to_sft": 1.0}]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import speed_kept

    return speed_kept


def plan(kept: Any, tokens: int = 4) -> Any:
    from speed_workloads import RANDOM_MODEL, Case, random_workload

    case = Case(RANDOM_MODEL, "none", False, "float32")
    return kept.Plan(case, random_workload(8, tokens, 2, 100), {"sft": 1}, {"sft": 3})


def test_a_finished_setting_is_read_again(kept: Any, tmp_path: Path) -> None:
    rows = kept.KeptRows(tmp_path, "a machine", 4)
    assert rows.read(plan(kept)) is None
    rows.keep(plan(kept), ROWS)
    assert kept.KeptRows(tmp_path, "a machine", 4).read(plan(kept)) == ROWS
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_another_setting_machine_or_step_is_measured_anew(kept: Any, tmp_path: Path) -> None:
    kept.KeptRows(tmp_path, "a machine", 4).keep(plan(kept), ROWS)
    assert kept.KeptRows(tmp_path, "another machine", 4).read(plan(kept)) is None
    assert kept.KeptRows(tmp_path, "a machine", 8).read(plan(kept)) is None
    rows = kept.KeptRows(tmp_path, "a machine", 4)
    assert rows.read(plan(kept, tokens=5)) is None
    assert rows.read(dataclasses.replace(plan(kept), rounds={"sft": 5})) is None
    lora = dataclasses.replace(plan(kept).case, adapter="lora")
    assert rows.read(dataclasses.replace(plan(kept), case=lora)) is None


def test_other_code_is_measured_anew(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src/prefillshare_train/core/attention.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(kept, "_ROOT", tmp_path)
    source.write_text("fast = False\n")
    kept.KeptRows(tmp_path / "runs", "a machine", 4).keep(plan(kept), ROWS)
    source.write_text("fast = True\n")
    assert kept.KeptRows(tmp_path / "runs", "a machine", 4).read(plan(kept)) is None
