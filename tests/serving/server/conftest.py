"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from tests.serving.server.serving import Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server over the fake engine, one for the tests of a file."""
    with serve() as running:
        yield running
