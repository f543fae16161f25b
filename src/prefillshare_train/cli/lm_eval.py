"""`prefillshare lm-eval …`: lm-eval's own command line, with the model `prefillshare`."""

from __future__ import annotations

import sys

import typer

CONTEXT_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    # --help is lm-eval's too.
    "help_option_names": [],
}
"""For registering the command: every flag belongs to lm-eval."""


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval: --model prefillshare --model_args decoder=DIR --tasks … (all its own flags)."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("eval"):
        from lm_eval.__main__ import cli_evaluate

        # Importing it registers the model.
        import prefillshare_train.evaluation.lm_eval_model  # noqa: F401

        given = sys.argv
        sys.argv = ["prefillshare lm-eval", *context.args]
        try:
            cli_evaluate()
        finally:
            sys.argv = given
