"""A tiny base and decoders, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.serving.served import save_served

NAMES = ("math", "code", "full")


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base` and the decoders `NAMES`."""
    return save_served(tmp_path_factory.mktemp("served"), NAMES)
