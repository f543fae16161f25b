"""What .ci/run says about what it could not test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run"


@pytest.mark.parametrize("browser", [None, "chromium", "chromium-browser"])
def test_the_last_line_tells_that_no_browser_was_there(tmp_path: Path, browser: str | None) -> None:
    """Every step of a copy of the script is a command that does nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "rm", "timeout"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    for name in ("make", *([browser] if browser else [])):
        (programs / name).write_text("#!/usr/bin/env bash\n")
        (programs / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    done = subprocess.run(
        [script], env={"PATH": str(programs)}, capture_output=True, text=True, check=False
    )
    last = done.stdout.splitlines()[-1]
    assert ("SKIPPED: test-page" in last) == (browser is None), done.stdout + done.stderr
