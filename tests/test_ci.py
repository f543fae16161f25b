"""What .ci/run says about what it could not test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run"


def ci(folder: Path, *others: str, make: str = "") -> tuple[int, str]:
    """Status and last line of a copy of the script, each of whose steps does nothing.

    Args:
        others: further programs that are there.
        make: body of the `make` that it calls.
    """
    programs = folder / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "dirname", "mktemp", "rm", "timeout"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    for name in ("make", *others):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{make if name == 'make' else ''}\n")
        (programs / name).chmod(0o755)
    (folder / ".ci").mkdir()
    script = shutil.copy(SCRIPT, folder / ".ci" / "run")
    # The Python of the environment, which checks the wheel, is missing: that step fails.
    done = subprocess.run(
        [script], env={"PATH": str(programs)}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("browser", [None, "chromium", "chromium-browser"])
def test_the_last_line_tells_that_no_browser_was_there(tmp_path: Path, browser: str | None) -> None:
    _, last = ci(tmp_path, *([browser] if browser else []))
    assert ("test-page" in last) == (browser is None), last


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("vllm-packages", "SKIPPED: test-vllm"),
        ("test-vllm", "FAILED after 0 s: wheel test-vllm"),
        ("test", "FAILED after 0 s: wheel test"),
    ],
)
def test_only_a_missing_download_is_no_failure(tmp_path: Path, fails: str, told: str) -> None:
    code, last = ci(tmp_path, "chromium", make=f'[ "$1" != {fails} ]')
    assert code == 1
    assert told in last.replace("after 1 s", "after 0 s")
    assert ("test-vllm" in last) == ("test-vllm" in told)
