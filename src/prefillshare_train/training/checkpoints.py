"""Checkpoints that are complete or absent, and a clean stop on SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from prefillshare_train.training.launch import any_rank
from prefillshare_train.training.state_files import (
    SCHEDULER,
    load_generators,
    load_optimizer,
    save_generators,
    save_optimizer,
)

_STAGING = ".unfinished-checkpoints"


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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            shutil.rmtree(self.output_folder / _STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

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
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == place or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        _flush(written)
        if place.exists():
            shutil.rmtree(place)
        written.rename(place)
        _flush_folder(run_dir)
        self._staging.rmdir()
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )


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
