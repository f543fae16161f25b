"""Loss curves as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(histories: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Training and evaluation loss against steps, one colour a run.

    Args:
        histories: a Trainer's `log_history` for each run's name.
        path: PNG to write, complete or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, history) in enumerate(histories.items()):
        colour = f"C{number}"
        train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        held = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.5, label=f"{name}: training")
        if held:
            axes.plot(*zip(*held, strict=True), "o-", color=colour, label=f"{name}: held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per response token)")
    axes.grid(alpha=0.3)
    axes.legend()
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png", dpi=150)
    beside.replace(path)
    return path
