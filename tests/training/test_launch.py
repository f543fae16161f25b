"""Two processes through `accelerate launch`, as a user would: the same losses, and one checkpoint.

The golden curve is that of one process on the same global batch. After a change that is meant to
move it: `python -m tests.training.test_launch`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import write_jsonl
from tests.training import tiny

from prefillshare_train.core.contract import Contract
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import run_training

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "recipes" / "accelerate"
GOLDEN = REPOSITORY / "tests" / "assets" / "loss_curves.json"
RECIPE = """
base: {{model: {base}, dtype: float32}}
decoder: {{adapter: none, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}, eval_fraction: 0.2, eval_max_rows: 9}}
training: {{output_dir: replaced, max_steps: 6, logging_steps: 1, save_steps: 3, report_to: none,
           learning_rate: 0.01, max_grad_norm: 0.0, per_device_train_batch_size: 2,
           gradient_accumulation_steps: 2, per_device_eval_batch_size: 2, disable_tqdm: true}}
"""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
)


def make_recipe(folder: Path) -> Path:
    base = tiny.save_base(folder / "base")
    rows = [
        {"prompt": f"Say {n} {'please ' * (n % 5)}.", "completion": f"{n}{'!' * (n % 7)}"}
        for n in range(60)
    ]
    source = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, rows=source))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("launch"))


def curve(decoder: Path) -> list[float]:
    """Training losses by step, then the final evaluation's."""
    history = json.loads((decoder / "log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return [*losses, *(entry["eval_loss"] for entry in history if "eval_loss" in entry)]


def one_process(recipe: Path, out: Path, adapter: str, *options: str) -> list[float]:
    overrides = [f"decoder.adapter={adapter}", f"training.output_dir={out}", *options]
    result = run_training(
        load_recipe([recipe], [*overrides, "training.per_device_train_batch_size=4"])
    )
    assert result.decoder is not None
    return curve(result.decoder)


def launch(config: str, *arguments: object, watched: bool = True, **environment: str) -> Any:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += (
        config.split() if config.startswith("--") else ["--config_file", str(CONFIGS / config)]
    )
    command += ["--main_process_port", "0"]
    script = [str(REPOSITORY / "tests" / "training" / "launched.py")]
    command += script if watched else ["-m", "prefillshare_train.train"]
    kept = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "RANK", "WORLD_SIZE")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**kept, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_one_process_follows_the_golden_curve(recipe: Path, tmp_path: Path, adapter: str) -> None:
    golden = json.loads(GOLDEN.read_text())[adapter]
    assert one_process(recipe, tmp_path / "run", adapter) == pytest.approx(golden, rel=1e-4)
    assert golden[0] > golden[-1], "a curve that does not fall proves little"


def check_engine(
    recipe: Path, out: Path, config: str, kind: str, engine: str, *overrides: str
) -> dict[str, Any]:
    """Killed on one rank, resumed, finished: the golden curve, one decoder, an untouched base."""
    arguments = [recipe, f"training.output_dir={out}", *overrides]
    killed = launch(config, *arguments, LAUNCHED_KILL="1:4")
    assert killed.returncode != 0
    assert [p.name for p in out.iterdir() if p.name.startswith("checkpoint")] == ["checkpoint-3"]
    facts_file = out / "facts.json"
    resumed = launch(config, *arguments, "--resume", LAUNCHED_FACTS=str(facts_file))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("decoder: ") == 1, "each rank thinks it is the first"
    adapter = "lora" if "decoder.adapter=lora" in overrides else "none"
    golden = json.loads(GOLDEN.read_text())[adapter]
    assert curve(out / "decoder") == pytest.approx(golden, rel=1e-4)
    facts: dict[str, Any] = json.loads(facts_file.read_text())
    assert (facts["distributed_type"], facts["processes"]) == (kind, 2)
    assert engine in facts["engine"]
    assert facts["base_fingerprint"] == Contract.load(out / "decoder").base_fingerprint
    assert facts["base_in_optimizer"] == facts["base_gradients"] == 0
    load_decoder(out / "decoder")  # one whole model, over the base that its contract names
    return facts


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


@needs_deepspeed
def test_zero2(recipe: Path, tmp_path: Path) -> None:
    check_engine(recipe, tmp_path / "run", "cpu/zero2.yaml", "DEEPSPEED", "DeepSpeedEngine")


@needs_deepspeed
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


@needs_deepspeed
def test_deepspeed_clips_where_asked_only(recipe: Path, tmp_path: Path) -> None:
    """With plain gradient descent, whose steps show the scale of a gradient as Adam's do not."""
    options = ["training.optim=sgd", "training.learning_rate=0.05", "training.max_steps=2"]
    alone = one_process(recipe, tmp_path / "alone", "none", *options)
    out = tmp_path / "run"
    config = f"--config_file {CONFIGS / 'cpu' / 'zero2.yaml'} --gradient_clipping 0.0"
    done = launch(config, recipe, f"training.output_dir={out}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(out / "decoder") == pytest.approx(alone, rel=1e-5)


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
        ("cpu/zero2.yaml", "DEEPSPEED", "DeepSpeedEngine", ["decoder.adapter=lora"]),
        ("cpu/zero3.yaml", "DEEPSPEED", "DeepSpeedEngine", []),
        ("cpu/zero3.yaml", "DEEPSPEED", "DeepSpeedEngine", ["decoder.adapter=lora"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_other_combinations(
    recipe: Path, tmp_path: Path, config: str, kind: str, engine: str, overrides: list[str]
) -> None:
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    check_engine(recipe, tmp_path / "run", config, kind, engine, *overrides)


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        ("--cpu --num_processes 2", {}, "asked for several processes and started one"),
        (
            "--num_processes 2 --use_deepspeed --zero_stage 2",
            {"ACCELERATE_USE_CPU": "true"},
            "DEEPSPEED was asked for and accelerate made",
        ),
    ],
    ids=["one-process-alone", "deepspeed-left-out"],
)
def test_a_mis_launch_is_refused(
    recipe: Path, tmp_path: Path, config: str, environment: dict[str, str], message: str
) -> None:
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
    out = tmp_path / "run"
    arguments = [recipe, f"training.output_dir={out}"]
    done = launch(config, *arguments, watched=False, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "recipes/accelerate" in done.stderr
    assert not out.exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = make_recipe(Path(scratch))
        curves = {a: one_process(made, Path(scratch) / a, a) for a in ("none", "lora")}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
