"""Evaluation and answers during training: what they leave in the log, once each."""

from __future__ import annotations

from pathlib import Path

import yaml
from tests.data.helpers import write_jsonl
from tests.training import tiny

from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import run_training


def test_a_step_that_also_generates_and_evaluates_logs_each_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(20)]
    values = {
        "base": {"model": str(tiny.save_base(tmp_path / "base")), "dtype": "float32"},
        "decoder": {"adapter": "lora", "lora": {"r": 4, "target_modules": "all-linear"}},
        "data": {
            "train": {"source": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
            "eval_fraction": 0.2,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "logging_steps": 1,
            "generate_every": 2,
            "generate_rows": 2,
            "generate_max_new_tokens": 3,
            "per_device_train_batch_size": 3,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    history = run_training(load_recipe([tmp_path / "recipe.yaml"])).trainer.state.log_history
    steps = {
        key: [entry["step"] for entry in history if key in entry]
        for key in ("loss", "eval_exact_match", "eval_loss")
    }
    assert steps == {"loss": [1, 2, 3, 4], "eval_exact_match": [2, 4], "eval_loss": [2, 4]}
