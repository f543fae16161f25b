"""Generated documents are what the code generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_training_md_is_up_to_date() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_that_the_method_adds_is_documented() -> None:
    text = (DOCS / "training.md").read_text()
    for key in ("training.generate_every", "data.train_on", "base.revision", "decoder.lora"):
        assert f"`{key}`" in text
