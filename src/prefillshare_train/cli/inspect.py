"""`prefillshare inspect RECIPE… [key=value …]`."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    recipe: Annotated[
        list[str],
        typer.Argument(help="Recipe files, composed left to right, and key=value overrides."),
    ],
    rows: Annotated[int, typer.Option(help="Conversations to print.")] = 3,
) -> None:
    """Show which tokens the base runs, which the decoder runs and which are trained."""
    from rich.console import Console

    from prefillshare_train.cli.errors import user_errors
    from prefillshare_train.training.inspection import data_summary, token_views
    from prefillshare_train.training.recipe import load_recipe
    from prefillshare_train.training.run import prepare_data

    # Reports quote rows and templates, where [/INST] and :x: mean themselves.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    files = [item for item in recipe if "=" not in item]
    with user_errors():
        loaded = load_recipe(files, [item for item in recipe if "=" in item])
        data = prepare_data(loaded)
        for view in token_views(loaded.recipe, data, rows, marks=not console.is_terminal):
            console.print(view)
        for table in data_summary(loaded.recipe, data):
            console.print(table)
