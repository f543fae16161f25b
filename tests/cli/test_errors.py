"""Errors that users can correct are told in one line; others keep their traceback."""

from __future__ import annotations

import importlib

import pytest
import typer

from prefillshare_train.cli.errors import KNOWN, user_errors


@pytest.mark.parametrize(("module", "name"), KNOWN)
def test_each_known_error_is_one_line(
    module: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(importlib.import_module(f"prefillshare_train.{module}"), name)
    with pytest.raises(typer.Exit) as ended, user_errors():
        raise kind("what to do")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "prefillshare: what to do\n"


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="a fault of ours"), user_errors("serve"):
        raise ValueError("a fault of ours")


def test_a_missing_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ModuleNotFoundError("no", name="uvicorn")
    with pytest.raises(typer.Exit), user_errors("serve"):
        raise missing
    assert "pip install 'prefillshare-train[serve]'" in capsys.readouterr().err
