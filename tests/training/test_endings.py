"""How runs end: with the best weights, by a signal, or where an earlier start had ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training import tiny
from tests.training.launching import launch
from transformers import TrainerCallback

from prefillshare_train.training.checkpoints import replace_folder
from prefillshare_train.training.decoders import train_decoders
from prefillshare_train.training.recipe import RecipeError, load_recipe
from prefillshare_train.training.run import RunResult, prepare_run, run_training

# The highest loss counts as the best, so that the last weights are not it.
BEST = {
    "max_steps": 3,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "learning_rate": 0.01,
    "per_device_eval_batch_size": 2,  # each rank evaluates some rows
}


def train(recipe: Path, *overrides: str, resume: bool = False) -> RunResult:
    return run_training(load_recipe([recipe], overrides), resume=resume)


def log(decoder: Path | None, key: str) -> list[Any]:
    assert decoder is not None
    history = json.loads((decoder / "log_history.json").read_text())
    return [entry[key] for entry in history if key in entry]


def weights(decoder: Path | None) -> dict[str, torch.Tensor]:
    assert decoder is not None
    return load_file(decoder / "adapter_model.safetensors")


class SignalledOnce(TrainerCallback):
    """Sends this process a SIGTERM at the first event that `when` picks."""

    def __init__(self, when: Callable[[str, int], bool]) -> None:
        self.when = when
        self.saved: list[int] = []

    def _at(self, event: str, step: int) -> None:
        if self.when(event, step):
            self.when = lambda *_: False
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at("step", state.global_step + 1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at("evaluation", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved.append(state.global_step)


def signalled(
    recipe: Path, when: Callable[[str, int], bool], *overrides: str
) -> tuple[RunResult, SignalledOnce]:
    run = prepare_run(load_recipe([recipe], overrides))
    callback = SignalledOnce(when)
    run.trainer.add_callback(callback)
    return run.train(), callback


def test_the_best_weights_of_a_run_that_was_moved_are_published(tmp_path: Path) -> None:
    recipe = tiny.save_recipe(tmp_path, BEST)
    first = train(recipe)
    losses = log(first.decoder, "eval_loss")
    assert losses[-1] == max(losses) > losses[-2], "the last weights are the best"
    wanted = weights(first.decoder)
    took = log(first.decoder, "train_runtime")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(recipe, f"training.output_dir={tmp_path / 'moved'}", resume=True)
    assert all(torch.equal(wanted[name], value) for name, value in weights(again.decoder).items())
    assert log(again.decoder, "eval_loss")[-1] == losses[-1]
    assert log(again.decoder, "train_runtime") == took, "a start without a step tells its own time"


def test_the_best_weights_are_every_ranks(tmp_path: Path) -> None:
    recipe = tiny.save_recipe(tmp_path, BEST)
    result = launch("cpu/ddp.yaml", recipe, watched=False)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = log(tmp_path / "run" / "decoder", "eval_loss")
    assert max(losses) > losses[-2] + 1e-3, "the last weights are the best"
    assert losses[-1] == pytest.approx(max(losses), abs=1e-5)


def test_a_signal_after_the_last_step_stops_nothing(tmp_path: Path) -> None:
    training = {"num_train_epochs": 1, "save_strategy": "no", "eval_strategy": "epoch"}
    recipe = tiny.save_recipe(tmp_path, training)
    result, _ = signalled(recipe, lambda event, _: event == "evaluation")
    assert result.decoder is not None
    assert result.decoder.is_dir()


def test_an_epoch_that_a_signal_breaks_off_is_saved_once_and_not_evaluated(tmp_path: Path) -> None:
    training = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    recipe = tiny.save_recipe(tmp_path, training)
    result, seen = signalled(recipe, lambda event, step: (event, step) == ("step", 3))
    assert result.decoder is None
    assert seen.saved == [3]
    assert not [entry for entry in result.trainer.state.log_history if "eval_loss" in entry]
    whole = train(recipe, resume=True)
    assert len(set(log(whole.decoder, "step"))) == result.trainer.state.max_steps
    shutil.rmtree(tmp_path / "run")
    epoch = result.trainer.state.max_steps // 2
    result, seen = signalled(recipe, lambda event, step: (event, step) == ("step", epoch))
    assert result.decoder is None
    assert seen.saved == [epoch, epoch], "the evaluation of a whole epoch is lost"
    steps = [entry["step"] for entry in train(recipe, resume=True).trainer.state.log_history]
    assert steps.count(epoch) == 2


def test_what_is_replaced_goes_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place = tmp_path / "beside" / "new", tmp_path / "place"
    for folder in (new, place):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    plain, deleted = shutil.rmtree, []

    def watched(path: Path) -> None:
        assert (place / "file").read_text() == "new"
        deleted.append((path / "file").read_text())
        plain(path)

    monkeypatch.setattr(shutil, "rmtree", watched)
    replace_folder(new, place)
    assert deleted == ["place"]
    assert [path.name for path in tmp_path.rglob("*")].count("file") == 1


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_finished_decoder_is_given_back_as_it_is(tmp_path: Path, strategy: str) -> None:
    recipe = tiny.save_recipe(tmp_path, {"max_steps": 2, "save_strategy": strategy})
    first = train(recipe)
    assert first.decoder is not None
    made = first.decoder.stat().st_ino
    again = train(recipe, resume=True)
    assert again.decoder == first.decoder
    assert first.decoder.stat().st_ino == made, "it is published a second time"
    assert again.trainer.state.log_history == first.trainer.state.log_history
    assert again.trainer.state.global_step == 2
    if strategy == "no":
        with pytest.raises(RecipeError, match=r"no checkpoint(.|\n)*training.max_steps: 2, now 3"):
            train(recipe, "training.max_steps=3", resume=True)
        assert first.decoder.stat().st_ino == made


def test_decoders_that_have_finished_wait_for_the_others(tmp_path: Path) -> None:
    training = {"max_steps": 2, "save_strategy": "no"}
    loaded = load_recipe([tiny.save_recipe(tmp_path, training, decoders={"a": {}, "b": {}})])
    whole = train_decoders(loaded)
    a, b = (result.decoder for result in whole.values())
    assert a is not None
    assert b is not None
    made, wanted = a.stat().st_ino, weights(b)
    shutil.rmtree(b)
    again = train_decoders(loaded, resume=True)
    assert [result.decoder for result in again.values()] == [a, b]
    assert a.stat().st_ino == made
    assert all(torch.equal(wanted[name], value) for name, value in weights(b).items())


def test_a_start_without_a_step_tells_no_time_and_no_loss(tmp_path: Path) -> None:
    recipe = tiny.save_recipe(tmp_path, {"max_steps": 2})
    decoder = train(recipe).decoder
    assert decoder is not None
    shutil.rmtree(decoder)
    decoder = train(recipe, resume=True).decoder
    assert not log(decoder, "train_runtime") + log(decoder, "train_loss")
    assert log(decoder, "eval_loss")


def test_a_checkpoint_goes_on_with_the_arguments_it_began_with(tmp_path: Path) -> None:
    recipe = tiny.save_recipe(tmp_path, {"max_steps": 2, "learning_rate": 0.01})
    train(recipe)
    others = ("training.learning_rate=0.02", "training.per_device_train_batch_size=2")
    with pytest.raises(RecipeError, match=r"checkpoint-2 was trained with other") as error:
        train(recipe, *others, "training.max_steps=3", resume=True)
    assert "training.learning_rate: 0.01, now 0.02" in str(error.value)
    assert "training.per_device_train_batch_size: 3, now 2" in str(error.value)
    assert train(recipe, "training.max_steps=3", resume=True).trainer.state.global_step == 3
