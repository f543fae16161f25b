"""The command's refusals, before anything is loaded."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from prefillshare_train.cli.main import app


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder", "math"], "give NAME=FOLDER"),
        (["--decoder", "a=x", "--decoder", "a=y"], "given twice"),
        (["--host", "0.0.0.0"], "API key"),
        (["--kv-gib", "0"], "kv_bytes"),
        (["--chunk-tokens", "4"], "chunk_tokens"),
        (["--max-n", "0"], "max_n"),
    ],
)
def test_mistakes_are_told_in_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--base", "nowhere", *options])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
