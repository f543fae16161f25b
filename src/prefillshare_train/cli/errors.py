"""Faults of the user's input, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print the message of a user's error and exit with status 2."""
    from prefillshare_train.core.contract import ContractError
    from prefillshare_train.core.families import UnsupportedModelError
    from prefillshare_train.data import DataError
    from prefillshare_train.training.checkpoints import CheckpointReadError, CheckpointWriteError
    from prefillshare_train.training.recipe import RecipeError
    from prefillshare_train.training.trainer import TrainingDivergedError

    known = (
        CheckpointReadError,
        CheckpointWriteError,
        ContractError,
        DataError,
        RecipeError,
        TrainingDivergedError,
        UnsupportedModelError,
    )
    try:
        yield
    except known as error:
        typer.echo(f"prefillshare: {error}", err=True)
        raise typer.Exit(2) from None
