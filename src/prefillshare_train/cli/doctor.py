"""`prefillshare doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the hub.")] = 5.0,
) -> None:
    """Tell what works on this machine, and how to repair what does not."""
    from prefillshare_train.cli.doctor_checks import all_checks

    faults = 0
    for title, findings in all_checks(timeout):
        typer.secho(f"\n{title}", bold=True)
        for finding in findings:
            faults += finding.level == "bad"
            colour = {"ok": "green", "note": "yellow", "bad": "red"}[finding.level]
            mark = typer.style(f"{finding.level:>5}", fg=colour)
            typer.echo(f"{mark}  {finding.subject}: {finding.found}")
            if finding.fix:
                typer.echo(f"       → {finding.fix}")
    typer.echo(f"\n{faults} to repair" if faults else "\nnothing to repair")
    if faults:
        raise typer.Exit(1)
