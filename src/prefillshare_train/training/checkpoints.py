"""Checkpoints that are complete or absent, and a clean stop on SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from prefillshare_train.training.launch import any_rank
from prefillshare_train.training.recipe import RecipeError
from prefillshare_train.training.state_files import (
    SCHEDULER,
    load_generators,
    load_optimizer,
    save_generators,
    save_optimizer,
)

_STAGING = ".unfinished-checkpoints"
_KEPT = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
)
"""Arguments that a checkpoint's optimizer, schedule and place in the data go on with."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class CheckpointReadError(ValueError):
    """A checkpoint cannot be resumed from; the message says what it lacks."""


class AtomicCheckpoints(Trainer):
    """Writes each checkpoint beside its place and renames it there when all of it is on disk.

    A process killed at any moment leaves `checkpoint-N` complete or absent; what it left beside is
    removed by the next run.
    """

    _staging: Path | None = None

    @property
    def output_folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint in the output directory."""
        folder = self.output_folder
        return get_last_checkpoint(str(folder)) if folder.is_dir() else None

    @property
    def has_trained(self) -> bool:
        """Whether this start ran a step."""
        return bool(self.state.global_step > self._initial_global_step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            shutil.rmtree(self.output_folder / _STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed after its last checkpoint, and before its decoder was written, has
        # nothing left to train; the Trainer looks for the end after a step only and would take one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The time and mean loss of a start that ran no step would pass for the run's.
        if "train_runtime" not in logs or self.has_trained:
            super().log(logs, start_time)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        # The folder may have been moved since, and the Trainer keeps no path that is gone.
        self._find_best(Path(self._get_output_dir(trial)))
        return super()._finalize_training(trial, *args, **kwargs)

    def _find_best(self, run_dir: Path, published: Path | None = None) -> None:
        """Have the state name the best checkpoint where it lies, not where it was written."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == published or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        return super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run_dir / _STAGING
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(run_dir, name)
            self.accelerator.wait_for_everyone()
            self._find_best(run_dir)
        except Exception as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
            # safetensors reports a full disk with an error class of its own.
            if not isinstance(error, OSError | SafetensorError):
                raise
            last = self.last_checkpoint()
            raise CheckpointWriteError(
                f"{run_dir / name} could not be written: {error}. "
                + (f"The last good checkpoint is {last}" if last else "There is no earlier one")
                + ". Free some space and run the same command with --resume"
            ) from error
        finally:
            self._staging = None

    # -- states: safetensors and JSON in place of the Trainer's pickles ---------------------------

    @property
    def _sharded(self) -> bool:
        """DeepSpeed and FSDP write optimizer shards in formats of their own."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            save_optimizer(self.optimizer.state_dict(), Path(output_dir))
            text = json.dumps(self.lr_scheduler.state_dict())
            (Path(output_dir) / SCHEDULER).write_text(text)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if not (folder / SCHEDULER).is_file():
            raise CheckpointReadError(
                f"{folder} has no {SCHEDULER}: it holds a model only, or another program wrote it. "
                "Start a new run from its weights, or resume from a checkpoint of this trainer"
            )
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.optimizer.load_state_dict(load_optimizer(folder))
        self.lr_scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text()))

    def _generators_file(self, folder: str) -> Path:
        return Path(folder) / f"generators-{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_generators(self._generators_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._generators_file(checkpoint).is_file():
            load_generators(self._generators_file(checkpoint))

    def _publish(self, run_dir: Path, name: str) -> None:
        assert self._staging is not None
        written, place = self._staging / name, run_dir / name
        self._find_best(run_dir, published=place)
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        _flush(written)
        replace_folder(written, place)
        self._staging.rmdir()
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )


def differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each key whose value is not what it was."""
    return [
        f"  {key}: {began.get(key)!r}, now {now.get(key)!r}"
        for key in {**began, **now}
        if began.get(key) != now.get(key)
    ]


def check_arguments(folder: Path, args: TrainingArguments) -> None:
    """Refuse to go on from a folder that was trained with other arguments.

    The Trainer would go on with those that the optimizer's state holds, and the recipe that is
    published would tell others. The run's length may change.

    Raises:
        RecipeError: they differ; the message lists them.
    """
    began = json.loads((folder / "training_args.json").read_text())
    now = json.loads(args.to_json_string())
    different = differences(
        {f"training.{key}": began.get(key) for key in _KEPT},
        {f"training.{key}": now.get(key) for key in _KEPT},
    )
    if different:
        raise RecipeError(
            f"{folder} was trained with other arguments than the recipe gives here:\n"
            + "\n".join(different)
            + "\nSet them to what they were, or train anew in another training.output_dir"
        )


def replace_folder(new: Path, place: Path) -> None:
    """Rename a folder to its place; what lay there is deleted when the new one is there."""
    aside = new.with_name(f".replaced-{place.name}")
    if aside.exists():
        shutil.rmtree(aside)
    if place.exists():
        place.rename(aside)
    new.rename(place)
    _flush_folder(place.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _flush(folder: Path) -> None:
    """Force a folder's files to disk, so that the rename cannot outrun their contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finishes the running step, saves a checkpoint and ends training."""

    def __init__(self) -> None:
        self.stopped = False
        self._stopped_at = self._saved_at = -1
        self._previous: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # Python lets the main thread alone set handlers; whoever runs trainers in others sets
        # `stopped` itself.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # Ranks may be signalled a step apart; they must stop at the same one.
        self.stopped = any_rank(self.stopped, args.device)
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
            self._stopped_at = state.global_step

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._saved_at = state.global_step

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._stopped_at != state.global_step or state.global_step >= state.max_steps:
            return
        # An epoch that was broken off is gone on with, and evaluated, by the next start. That of
        # one which is whole is saved now, since the next start begins after it.
        broken_off = state.epoch is not None and state.epoch % 1 != 0
        control.should_evaluate = control.should_evaluate and not broken_off
        control.should_save = control.should_evaluate or self._saved_at != state.global_step

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
