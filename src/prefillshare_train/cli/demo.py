"""`prefillshare demo`: the whole method on a 135M model, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Where runs, table and plot go.")] = Path("runs/demo"),
    recipes: Annotated[Path, typer.Option(help="Folder of the demo's recipes.")] = Path(
        "recipes/demo"
    ),
    rows: Annotated[int, typer.Option(help="Held-out turns to answer.")] = 40,
    steps: Annotated[
        int | None, typer.Option(help="Train this many steps instead of the recipe's.")
    ] = None,
) -> None:
    """Train a tool-calling decoder, compare it with the base, and share one prefill."""
    from prefillshare_train.cli.errors import user_errors
    from prefillshare_train.cli.train import SIGTERM_STATUS
    from prefillshare_train.training.demo import DemoStoppedError, run_demo

    resumed = out.exists()
    started = time.perf_counter()
    try:
        with user_errors():
            typer.echo(run_demo(model, out, recipes, rows=rows, steps=steps))
    except DemoStoppedError:
        typer.echo("stopped by SIGTERM after saving; the same command goes on", err=True)
        raise typer.Exit(SIGTERM_STATUS) from None
    minutes = (time.perf_counter() - started) / 60
    reused = "; what an earlier start had finished was reused" if resumed else ""
    typer.echo(f"{minutes:.1f} minutes{reused}")
