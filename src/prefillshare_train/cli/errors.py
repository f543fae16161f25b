"""Faults of the user's input, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

KNOWN = (
    ("core.contract", "ContractError"),
    ("core.families", "UnsupportedModelError"),
    ("data.errors", "DataError"),
    ("engines.vllm.errors", "VllmError"),
    ("evaluation.task", "EvaluationError"),
    ("hub.errors", "HubError"),
    ("serving.api", "ServingError"),
    ("training.checkpoints", "CheckpointReadError"),
    ("training.checkpoints", "CheckpointWriteError"),
    ("training.recipe", "RecipeError"),
    ("training.trainer", "TrainingDivergedError"),
    ("workloads.errors", "WorkloadError"),
)
"""Module and name of the errors that their users can correct."""


@contextlib.contextmanager
def user_errors(extra: str | None = None) -> Iterator[None]:
    """Print the message of a user's error and exit with status 2.

    Args:
        extra: the optional part of the package that the command needs; where a module of it is
            missing, the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("prefillshare_train"):
            raise
        typer.echo(
            f"prefillshare: the module {error.name} is missing; "
            f"pip install 'prefillshare-train[{extra}]'",
            err=True,
        )
        raise typer.Exit(2) from None
    except Exception as error:
        if not isinstance(error, _known()):
            raise
        typer.echo(f"prefillshare: {error}", err=True)
        raise typer.Exit(2) from None


def _known() -> tuple[type[Exception], ...]:
    """Those whose module is loaded: no other can have been raised.

    Nothing is imported for its errors alone, so that a command runs where what others need is not
    installed, as beside vLLM.
    """
    found: list[type[Exception]] = []
    for module, name in KNOWN:
        loaded = sys.modules.get(f"prefillshare_train.{module}")
        if loaded is not None:
            found.append(getattr(loaded, name))
    return tuple(found)
