"""`prefillshare held-out RECIPE… --decoder DIR [--full-prompt DIR]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def held_out(
    recipe: Annotated[
        list[str],
        typer.Argument(help="The decoders' recipe files and key=value overrides: their data."),
    ],
    decoder: Annotated[Path, typer.Option(help="Decoder trained with method=prefillshare.")],
    full_prompt: Annotated[
        Path | None,
        typer.Option(help="Decoder trained with method=full_prompt; measured alone, and naive."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the figures; answers go beside it.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Turns to answer; all where not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Turns answered at once.")] = 16,
) -> None:
    """Compare base, full_prompt, naive sharing and prefillshare on a recipe's held-out rows.

    All run in the recipe's base.dtype; where that is auto, in the K/V dtype of --decoder.
    """
    from rich.console import Console

    from prefillshare_train.cli.errors import user_errors
    from prefillshare_train.training.comparison import held_out_report
    from prefillshare_train.training.recipe import load_recipe

    files = [item for item in recipe if "=" not in item]
    with user_errors():
        loaded = load_recipe(files, [item for item in recipe if "=" in item])
        table = held_out_report(
            loaded,
            decoder,
            full_prompt,
            out=out,
            rows=rows,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    Console().print(table)
