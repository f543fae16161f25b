"""`prefillshare train RECIPE… [key=value …]`."""

from __future__ import annotations

from typing import Annotated

import typer

SIGTERM_STATUS = 143


def train(
    recipe: Annotated[
        list[str],
        typer.Argument(help="Recipe files, composed left to right, and key=value overrides."),
    ],
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest complete checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check configuration, data and template; touch no weights."),
    ] = False,
) -> None:
    """Train a decoder on the base's prompt cache."""
    from prefillshare_train.cli.errors import user_errors
    from prefillshare_train.training.recipe import load_recipe

    files = [item for item in recipe if "=" not in item]
    overrides = [item for item in recipe if "=" in item]
    with user_errors():
        loaded = load_recipe(files, overrides)
        if dry_run:
            from prefillshare_train.training.dry_run import dry_run_report

            typer.echo(dry_run_report(loaded))
            return
        if loaded.recipe.decoders:
            from prefillshare_train.training.decoders import train_decoders

            results = list(train_decoders(loaded, resume=resume).values())
        else:
            from prefillshare_train.training.run import run_training

            results = [run_training(loaded, resume=resume)]
    if any(result.decoder is None for result in results):
        typer.echo("stopped by SIGTERM after saving; run the same command with --resume", err=True)
        raise typer.Exit(SIGTERM_STATUS)
    for result in results:
        if result.trainer.is_world_process_zero():
            typer.echo(f"decoder: {result.decoder}")
