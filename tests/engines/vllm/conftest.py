"""A base on disk, and a place of its own for fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.hub import decoders


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints are kept in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path, own_cache: None) -> Path:
    """A tiny base of this test's own."""
    return decoders.save_base(tmp_path / "base")
