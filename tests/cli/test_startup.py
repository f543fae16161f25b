"""`--help` answers at once: nothing heavy is imported before a command runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "pandas", "matplotlib", "accelerate",
         "huggingface_hub", "lm_eval", "fastapi", "jinja2", "yaml")  # fmt: skip
PROGRAM = """
import sys
sys.argv = ["prefillshare", *sys.argv[1:]]
from prefillshare_train.cli.main import app
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
print("IMPORTED", *sorted(name for name in sys.modules if "." not in name))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    shown, _, imported = done.stdout.partition("IMPORTED")
    assert "Usage" in shown
    assert set(HEAVY) & set(imported.split()) == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, prefillshare_train as p; p.__all__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(HEAVY) & set(done.stdout.split()) == set()
