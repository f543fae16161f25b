"""Two processes through `accelerate launch`, as a user would: what the tests of all kinds share.

The golden curve is that of one process on the same global batch. After a change that is meant to
move it: `python -m tests.training.launching`.
"""

from __future__ import annotations

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


def make_recipe(folder: Path) -> Path:
    base = tiny.save_base(folder / "base")
    rows = [
        {"prompt": f"Say {n} {'please ' * (n % 5)}.", "completion": f"{n}{'!' * (n % 7)}"}
        for n in range(60)
    ]
    source = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, rows=source))
    return folder / "recipe.yaml"


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


def check_refused_launch(
    recipe: Path, out: Path, config: str, message: str, **environment: str
) -> None:
    """Processes that are not what the configuration asked for end before anything is written."""
    done = launch(config, recipe, f"training.output_dir={out}", watched=False, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "recipes/accelerate" in done.stderr
    assert not out.exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = make_recipe(Path(scratch))
        curves = {a: one_process(made, Path(scratch) / a, a) for a in ("none", "lora")}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
