"""Real processes, really killed: the loss sequence goes on bit for bit."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.training import tiny

from prefillshare_train.training.checkpoints import CheckpointWriteError

SCRIPT = Path(__file__).with_name("train_script.py")


def start(folder: Path, losses: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(losses), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(folder: Path, losses: Path, *options: str) -> tuple[int, str]:
    process = start(folder, losses, *options)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode, output


def read(path: Path) -> dict[int, str]:
    """Loss by step; a step that two runs both took must have given the same bits."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        step, loss = line.split()
        assert found.get(int(step), loss) == loss, f"step {step} differs after resuming"
        found[int(step)] = loss
    return found


def undisturbed_losses(folder: Path, *options: str) -> dict[int, str]:
    code, output = run(folder / "run", folder / "losses", *options)
    assert (code, output.split()[-1]) == (0, "finished")
    losses = read(folder / "losses")
    assert sorted(losses) == list(range(1, 13))
    assert len(set(losses.values())) > 6, "losses that never change prove nothing"
    return losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return undisturbed_losses(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_full(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return undisturbed_losses(tmp_path_factory.mktemp("undisturbed_full"), "--adapter", "none")


BETWEEN, IN_SAVE = ("--kill-at", "5"), ("--kill-in-save", "6")


@pytest.mark.parametrize(
    ("adapter", "death"),
    [
        pytest.param("lora", ("--kill-at", "2"), id="before-any-save"),
        pytest.param("lora", BETWEEN, id="between-saves"),
        pytest.param("lora", ("--kill-at", "9"), id="at-a-save"),
        pytest.param("lora", IN_SAVE, id="during-a-save"),
        pytest.param("none", BETWEEN, id="full-between-saves"),
        pytest.param("none", IN_SAVE, id="full-during-a-save"),
    ],
)
def test_kill_9_then_the_same_command(
    tmp_path: Path, request: pytest.FixtureRequest, adapter: str, death: tuple[str, str]
) -> None:
    undisturbed = request.getfixturevalue(
        "undisturbed" if adapter == "lora" else "undisturbed_full"
    )
    weights = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    folder, losses = tmp_path / "run", tmp_path / "losses"
    code, _ = run(folder, losses, "--adapter", adapter, *death)
    assert code == -signal.SIGKILL
    for checkpoint in folder.glob("checkpoint-*"):
        for name in (weights, "optimizer.safetensors", "trainer_state.json"):
            assert (checkpoint / name).is_file(), f"{checkpoint.name} is half-written"
    assert not (folder / "checkpoint-6").exists() or death != IN_SAVE
    code, output = run(folder, losses, "--adapter", adapter)
    assert (code, output.split()[-1]) == (0, "finished")
    assert read(losses) == undisturbed
    pickles = [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert not pickles, "checkpoints are safetensors and JSON"
    assert not list(folder.glob(".unfinished*")), "what a killed run left beside is removed"


def test_sigterm_saves_and_ends(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    folder, losses = tmp_path / "run", tmp_path / "losses"
    process = start(folder, losses, "--sleep", "0.3", "--save-steps", "100")
    deadline = time.monotonic() + 60
    while not losses.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.split()[-1] == "stopped"
    last = max(read(losses))
    assert last < 12, "it did not stop"
    assert (folder / f"checkpoint-{last}" / "trainer_state.json").is_file()
    run(folder, losses)
    assert read(losses) == undisturbed


def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.full_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    plain = trainer._save_optimizer_and_scheduler

    def full(output_dir: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointWriteError, match=r"No space left.*checkpoint-2.*--resume"):
        trainer.train()
    assert [p.name for p in sorted(tmp_path.glob("*checkpoint*"))] == ["checkpoint-2"]


def test_writes_that_really_fail_leave_the_last_good_checkpoint(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    folder, losses = tmp_path / "run", tmp_path / "losses"
    process = start(folder, losses, "--full-from", "4")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "CheckpointWriteError" in errors
    assert "checkpoint-3" in errors.splitlines()[-1]
    assert [p.name for p in folder.glob("*checkpoint*")] == ["checkpoint-3"]
    run(folder, losses)
    assert read(losses) == undisturbed


def test_old_checkpoints_rotate_and_the_best_is_kept(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        learning_rate=3e-2,
        max_steps=5,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert Path(best).parent == tmp_path
    assert Path(best).is_dir()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
