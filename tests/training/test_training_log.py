"""Evaluation and answers during training: what they leave in the log, once each."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.training import tiny

from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import run_training


@pytest.mark.parametrize("best", [False, True])
def test_a_step_that_also_generates_and_evaluates_logs_each_once(
    tmp_path: Path, best: bool
) -> None:
    training = {
        "max_steps": 4,
        "generate_every": 2,
        "generate_rows": 2,
        "generate_max_new_tokens": 3,
        "save_strategy": "steps" if best else "no",
        "save_steps": 2,
        "load_best_model_at_end": best,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": True,
    }
    path = tiny.save_recipe(tmp_path, training)
    history = run_training(load_recipe([path])).trainer.state.log_history
    steps = {
        key: [entry["step"] for entry in history if key in entry]
        for key in ("loss", "eval_exact_match", "eval_loss")
    }
    # The weights that are published are evaluated; the best ones may not be the last.
    evaluated = [2, 4, 4] if best else [2, 4]
    assert steps == {"loss": [1, 2, 3, 4], "eval_exact_match": [2, 4], "eval_loss": evaluated}
