"""DeepSpeed ZeRO in two processes: the same losses, and one checkpoint.

A file of its own, so that it runs beside the other launches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.training.launching import (
    CONFIGS,
    check_engine,
    check_refused_launch,
    curve,
    launch,
    make_recipe,
    one_process,
)

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("launch"))


def test_zero2(recipe: Path, tmp_path: Path) -> None:
    check_engine(recipe, tmp_path / "run", "cpu/zero2.yaml", "DEEPSPEED", "DeepSpeedEngine")


def test_zero3_with_a_sharded_base(recipe: Path, tmp_path: Path) -> None:
    facts = check_engine(
        recipe,
        tmp_path / "run",
        "cpu/zero3.yaml",
        "DEEPSPEED",
        "DeepSpeedEngine",
        "training.shard_base=true",
    )
    assert facts["base_local"] <= 0.55 * facts["base_total"]
    # Each parameter at most once a pass, and once in some pass: small ones stay from then on.
    assert max(facts["elements_per_prefill"]) == facts["base_total"]


def test_deepspeed_clips_where_asked_only(recipe: Path, tmp_path: Path) -> None:
    """With plain gradient descent, whose steps show the scale of a gradient as Adam's do not."""
    options = ["training.optim=sgd", "training.learning_rate=0.05", "training.max_steps=2"]
    alone = one_process(recipe, tmp_path / "alone", "none", *options)
    out = tmp_path / "run"
    config = f"--config_file {CONFIGS / 'cpu' / 'zero2.yaml'} --gradient_clipping 0.0"
    done = launch(config, recipe, f"training.output_dir={out}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(out / "decoder") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("cpu/zero2.yaml", ["decoder.adapter=lora"]),
        ("cpu/zero3.yaml", []),
        ("cpu/zero3.yaml", ["decoder.adapter=lora"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_other_combinations(
    recipe: Path, tmp_path: Path, config: str, overrides: list[str]
) -> None:
    check_engine(recipe, tmp_path / "run", config, "DEEPSPEED", "DeepSpeedEngine", *overrides)


def test_a_launch_without_deepspeed_is_refused(recipe: Path, tmp_path: Path) -> None:
    check_refused_launch(
        recipe,
        tmp_path / "run",
        "--num_processes 2 --use_deepspeed --zero_stage 2",
        "DEEPSPEED was asked for and accelerate made",
        ACCELERATE_USE_CPU="true",
    )
