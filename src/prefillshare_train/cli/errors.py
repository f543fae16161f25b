"""Faults of the user's input, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def user_errors(extra: str | None = None) -> Iterator[None]:
    """Print the message of a user's error and exit with status 2.

    Args:
        extra: the optional part of the package that the command needs; where a module of it is
            missing, the message says how to install it.
    """
    from prefillshare_train.core.contract import ContractError
    from prefillshare_train.core.families import UnsupportedModelError
    from prefillshare_train.data import DataError
    from prefillshare_train.engines.vllm.errors import VllmError
    from prefillshare_train.evaluation.task import EvaluationError
    from prefillshare_train.hub.errors import HubError
    from prefillshare_train.serving.api import ServingError
    from prefillshare_train.training.checkpoints import CheckpointReadError, CheckpointWriteError
    from prefillshare_train.training.recipe import RecipeError
    from prefillshare_train.training.trainer import TrainingDivergedError
    from prefillshare_train.workloads.errors import WorkloadError

    known = (
        CheckpointReadError,
        CheckpointWriteError,
        ContractError,
        DataError,
        EvaluationError,
        HubError,
        RecipeError,
        ServingError,
        TrainingDivergedError,
        UnsupportedModelError,
        VllmError,
        WorkloadError,
    )
    try:
        yield
    except known as error:
        typer.echo(f"prefillshare: {error}", err=True)
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("prefillshare_train"):
            raise
        typer.echo(
            f"prefillshare: the module {error.name} is missing; "
            f"pip install 'prefillshare-train[{extra}]'",
            err=True,
        )
        raise typer.Exit(2) from None
