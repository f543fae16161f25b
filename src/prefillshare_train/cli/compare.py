"""`prefillshare compare RUN… --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `prefillshare eval` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for table and plots.")] = Path(
        "runs/comparison"
    ),
) -> None:
    """Put evaluations side by side: scores, intervals, paired tests and plots."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("eval"):
        from prefillshare_train.evaluation.compare import compare as read
        from prefillshare_train.evaluation.plots import plot_scores, plot_sharing
        from prefillshare_train.evaluation.records import write_text
        from prefillshare_train.evaluation.tables import html, markdown

        comparison = read(runs)
        out.mkdir(parents=True, exist_ok=True)
        plots = [*plot_scores(comparison, out), *plot_sharing(comparison, out)]
        table = markdown(comparison)
        write_text(out / "comparison.md", table)
        shown = [path.name for path in plots if path.suffix == ".svg"]
        write_text(out / "comparison.html", html(comparison, shown))
    typer.echo(table)
    typer.echo(f"written to {out}")
