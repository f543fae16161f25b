"""DDP and FSDP2 in two processes: the same losses, and one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.training.launching import (
    CONFIGS,
    GOLDEN,
    check_engine,
    check_refused_launch,
    curve,
    launch,
    make_recipe,
    one_process,
)

from prefillshare_train.core.contract import Contract


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("launch"))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_one_process_follows_the_golden_curve(recipe: Path, tmp_path: Path, adapter: str) -> None:
    golden = json.loads(GOLDEN.read_text())[adapter]
    assert one_process(recipe, tmp_path / "run", adapter) == pytest.approx(golden, rel=1e-4)
    assert golden[0] > golden[-1], "a curve that does not fall proves little"


def test_ddp(recipe: Path, tmp_path: Path) -> None:
    facts = check_engine(
        recipe,
        tmp_path / "run",
        "cpu/ddp.yaml",
        "MULTI_CPU",
        "DistributedDataParallel",
        "decoder.adapter=lora",
    )
    assert facts["base_local"] == facts["base_total"]


def test_fsdp2_with_a_sharded_base(recipe: Path, tmp_path: Path) -> None:
    sharded = "training.shard_base=true"
    facts = check_engine(recipe, tmp_path / "run", "cpu/fsdp2.yaml", "FSDP", "FSDP", sharded)
    assert facts["base_local"] <= 0.55 * facts["base_total"]
    # Two layers, and the root with the embeddings: each gathered once a pass.
    assert facts["gathers_per_prefill"] == [3]


HALF = ["base.dtype=bfloat16", "training.bf16=true"]


def check_half_precision(
    recipe: Path, out: Path, config: str, adapter: str, rel: float = 1e-4
) -> None:
    """As recipes/accelerate launches it: the curve of one process in bfloat16."""
    alone = one_process(recipe, out / "alone", adapter, *HALF)
    overrides = [f"decoder.adapter={adapter}", f"training.output_dir={out / 'run'}", *HALF]
    options = f"--config_file {CONFIGS / config} --mixed_precision bf16"
    done = launch(options, recipe, *overrides, watched=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(out / "run" / "decoder") == pytest.approx(alone, rel=rel)
    assert Contract.load(out / "run" / "decoder").kv_dtype == "bfloat16"


def test_lora_in_bfloat16_over_fsdp2(recipe: Path, tmp_path: Path) -> None:
    check_half_precision(recipe, tmp_path, "cpu/fsdp2.yaml", "lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "adapter", "rel"),
    [
        ("cpu/ddp.yaml", "lora", 1e-4),
        ("cpu/ddp.yaml", "none", 1e-4),
        # Its weights are rounded once a step, where autocast rounds them for products only.
        ("cpu/fsdp2.yaml", "none", 2e-3),
    ],
)
def test_the_others_in_bfloat16(
    recipe: Path, tmp_path: Path, config: str, adapter: str, rel: float
) -> None:
    check_half_precision(recipe, tmp_path, config, adapter, rel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind", "engine", "overrides"),
    [
        ("cpu/ddp.yaml", "MULTI_CPU", "DistributedDataParallel", []),
        ("cpu/fsdp2.yaml", "FSDP", "FSDP", []),
        ("cpu/fsdp2.yaml", "FSDP", "FSDP", ["decoder.adapter=lora"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_other_combinations(
    recipe: Path, tmp_path: Path, config: str, kind: str, engine: str, overrides: list[str]
) -> None:
    check_engine(recipe, tmp_path / "run", config, kind, engine, *overrides)


def test_a_launch_that_starts_one_process_is_refused(recipe: Path, tmp_path: Path) -> None:
    message = "asked for several processes and started one"
    check_refused_launch(recipe, tmp_path / "run", "--cpu --num_processes 2", message)
