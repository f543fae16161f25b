"""`accelerate launch -m prefillshare_train.train RECIPE… [key=value …] [--resume]`."""

from __future__ import annotations

import typer

from prefillshare_train.cli.train import train

if __name__ == "__main__":
    typer.run(train)
