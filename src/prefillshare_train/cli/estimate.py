"""`prefillshare estimate RECIPE… [key=value …] [--gpus N]`."""

from __future__ import annotations

from typing import Annotated

import typer


def estimate(
    recipe: Annotated[
        list[str],
        typer.Argument(help="Recipe files, composed left to right, and key=value overrides."),
    ],
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs of the parallel configurations compared.")
    ] = 8,
) -> None:
    """Memory of each parallel configuration and time of an epoch, without touching weights."""
    from prefillshare_train.cli.errors import user_errors
    from prefillshare_train.training.dry_run import estimate_lines
    from prefillshare_train.training.recipe import decoder_recipes, load_recipe
    from prefillshare_train.training.run import prepare_data

    files = [item for item in recipe if "=" not in item]
    with user_errors():
        loaded = load_recipe(files, [item for item in recipe if "=" in item])
        for name, one in (decoder_recipes(loaded) or {"": loaded}).items():
            lines = estimate_lines(one, prepare_data(one).train, gpus)
            typer.echo("\n".join([f"== {name}", *lines] if name else lines))
