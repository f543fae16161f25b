"""`make bench-train`: which rows are taken again, and which are measured anew."""

from __future__ import annotations

import argparse
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


def test_a_quick_run_that_falls_behind_takes_fewer_rounds(kept: Any) -> None:
    from speed_plans import in_time
    from speed_workloads import METHODS

    plans = [dataclasses.replace(plan(kept), flops=dict.fromkeys(METHODS, 10**9))] * 2
    plans = [dataclasses.replace(p, rounds=dict.fromkeys(METHODS, 3)) for p in plans]
    rates = {"float32": 1e9}
    whole = sum(p.seconds(1e9) for p in plans)
    assert in_time(plans, rates, 1.0, whole + 0.01) == plans[0]
    assert in_time(plans, rates, 1.0, whole - 0.01).rounds == dict.fromkeys(METHODS, 2)
    assert in_time(plans, rates, 1.5, whole + 0.01).rounds["sft"] < 3
    assert in_time(plans, rates, 1.0, 0.0).rounds == dict.fromkeys(METHODS, 1)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ([], "benchmarks/results/train_speed.json"),
        (["--quick"], "runs/train_speed/quick.json"),
        (["--quick", "--out", "here.json"], "here.json"),
    ],
)
def test_a_quick_run_leaves_the_whole_grids_results(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], place: str
) -> None:
    import train_speed

    (tmp_path / "config.json").touch()
    monkeypatch.setattr("sys.argv", ["train_speed.py", "--model", str(tmp_path), *given])
    assert train_speed.parse().out == Path(place)


def test_a_round_is_compared_with_itself(kept: Any) -> None:
    from train_speed import step_ratio

    drifting = [1.0, 2.0, 4.0]  # a machine that halves its speed from round to round
    assert step_ratio(drifting, [seconds / 2 for seconds in drifting], 4, 0.0) == 2.0
    assert step_ratio(drifting, [2.0, 4.0], 4, 0.0) == 0.5  # of fewer rounds
    assert step_ratio([1.0], [0.5], passes=2, optimizer_seconds=1.0) == 1.5


def test_memory_is_measured_in_the_largest_micro_batch(kept: Any) -> None:
    from speed_workloads import random_workload

    small, large = (random_workload(prompt, 4, 2, 100).micro_batches[0] for prompt in (8, 28))
    several = dataclasses.replace(plan(kept).workload, micro_batches=(small, large, small))
    assert several.largest.micro_batches == (large,)
    assert dataclasses.replace(plan(kept), workload=several).memory_share == 64 / (24 + 64 + 24)


def test_what_the_targets_are_about_comes_first(kept: Any, tmp_path: Path) -> None:
    from rich.console import Console
    from speed_plans import all_plans
    from speed_workloads import RANDOM_MODEL, Case

    Case(RANDOM_MODEL, "none", False, "float32").config().save_pretrained(tmp_path)
    options = argparse.Namespace(
        model=str(tmp_path),
        micro_batch=2,
        checkpointing=None,
        dtype=["bfloat16", "float32"],
        no_random=False,
        shapes=[(16, 8), (32, 8)],
        rounds=None,
        seal_tools=tmp_path / "absent",
    )
    plans = all_plans(options, Console(quiet=True))
    assert len(plans) == 2 * 2 * 2 * 2 * 2  # shapes, dtypes, adapters, models, checkpointing
    assert len({(p.case, p.workload.name) for p in plans}) == len(plans)
    settings = [(p.case.model == RANDOM_MODEL, p.case.checkpointing, p.case.dtype) for p in plans]
    assert settings[:8] == [(False, False, "bfloat16")] * 4 + [(False, False, "float32")] * 4
    assert settings[-8:] == [(False, True, "float32")] * 4 + [(True, True, "float32")] * 4


@pytest.mark.parametrize(
    ("dtype", "loss", "near", "far"),
    [
        ("float32", 0.7, 0.700001, 0.7001),
        ("float32", 13.0, 13.0001, 13.001),
        ("bfloat16", 0.7, 0.706, 0.715),
        ("bfloat16", 13.0, 13.05, 13.08),
    ],
)
def test_methods_that_train_different_things_are_not_compared(
    kept: Any, dtype: str, loss: float, near: float, far: float
) -> None:
    from train_speed import check_losses

    check_losses({"sft": loss, "prefillshare": near}, dtype, "a setting")
    with pytest.raises(
        SystemExit, match=r"a setting: the loss of trl at step 0 is .*, that of sft"
    ):
        check_losses({"sft": loss, "trl": far}, dtype, "a setting")
    with pytest.raises(SystemExit, match="nan"):
        check_losses({"sft": loss, "prefillshare": float("nan")}, dtype, "a setting")
