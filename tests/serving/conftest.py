"""The tiny served models, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.serving.served import Oracle, load_served, save_served

from prefillshare_train.serving.models import ServedModels


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def models(served_folder: Path) -> ServedModels:
    return load_served(served_folder)


@pytest.fixture(scope="session")
def oracle(served_folder: Path) -> Oracle:
    return Oracle(served_folder)
