"""Sessions are counted by other threads than the engine's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from tests.serving.served import Collector, engine_of, request

from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.sessions import SessionTable


def test_a_session_that_comes_while_they_are_counted_breaks_nothing() -> None:
    table = SessionTable(2, 60.0, lambda worker, blocks: None)

    class Promised(int):
        """Stands for the engine's thread, which gets its turn in the middle of the count."""

        def __bool__(self) -> bool:
            table.begin("late", "", 0, 0, (), 0.0)
            return True

    for name in ("first", "second"):
        turn = table.begin(name, "", 0, 0, (), 0.0)
        assert turn is not None
        turn.session.reserved = Promised(2)
    assert len(table) == 2
    assert table.get("late") is not None


@pytest.fixture
def restless_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_statistics_can_be_read_at_any_moment(models: ServedModels) -> None:
    faults: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                engine.stats()
            except Exception as error:  # whatever it is, it would be a 500 of /ready
                faults.append(error)
                return

    options = {"session_tokens": 4, "max_waiting": 300, "prefill_workers": 2}
    with engine_of(models, 1200, **options) as engine:
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        found = Collector()
        for number in range(300):
            end = number % 4 == 0
            one = request("math", range(10, 20), 1, session=f"s{number}", end_session=end)
            engine.submit(one, found)
        assert engine.drain(60)
        done.set()
        reader.join(10)
    assert not faults
