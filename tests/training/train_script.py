"""A training process for the durability tests, killed or stopped from outside or at a chosen point.

python tests/training/train_script.py FOLDER LOSSES [options]
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tests.training import tiny
from transformers import TrainerCallback

from prefillshare_train.training.checkpoints import StopOnSignal
from prefillshare_train.training.trainer import CacheConditionedTrainer


class Recorder(TrainerCallback):
    """Appends each step's loss, bit for bit; kills its own process after a given step."""

    def __init__(
        self, path: Path, kill_at: int | None, full_from: int | None, sleep: float
    ) -> None:
        self.path, self.kill_at, self.full_from = path, kill_at, full_from
        self.sleep = sleep

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            with self.path.open("a") as file:
                file.write(f"{state.global_step} {float(logs['loss']).hex()}\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(self.sleep)
        if state.global_step == self.full_from:
            # No file may grow past this any more, so that the weights fail as on a full disk.
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledInSave(CacheConditionedTrainer):
    """Dies by SIGKILL in the middle of writing one checkpoint, after the weights."""

    kill_in_save: int | None = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("losses", type=Path)
    parser.add_argument("--adapter", choices=("lora", "none"), default="lora")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--full-from", type=int)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stop = StopOnSignal()
    recorder = Recorder(options.losses, options.kill_at, options.full_from, options.sleep)
    base = None
    if options.adapter == "lora":
        model = tiny.lora(lora_dropout=0.1)  # dropout: the generators must resume too
    else:
        model = tiny.model()
        base = copy.deepcopy(model)
    trainer = KilledInSave(
        model,
        tiny.arguments(
            options.folder,
            max_steps=12,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=options.save_steps,
            lr_scheduler_type="cosine",
        ),
        base=base,
        train_dataset=tiny.conversations(30),
        callbacks=[stop, recorder],
    )
    trainer.kill_in_save = options.kill_in_save
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    print("stopped" if stop.stopped else "finished")


if __name__ == "__main__":
    main()
