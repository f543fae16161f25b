"""Sessions: whose they are, and that they are counted by other threads than the engine's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from tests.serving.served import Collector, assert_nothing_leaks, engine_of, request, run

from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.sessions import SessionTable


def test_a_session_that_comes_while_they_are_counted_breaks_nothing() -> None:
    table = SessionTable(2, 60.0, lambda worker, blocks: None)

    class Promised(int):
        """Stands for the engine's thread, which gets its turn in the middle of the count."""

        def __bool__(self) -> bool:
            table.begin((None, "late"), "", 0, 0, (), 0.0)
            return True

    for name in ("first", "second"):
        turn = table.begin((None, name), "", 0, 0, (), 0.0)
        assert turn is not None
        turn.session.reserved = Promised(2)
    assert len(table) == 2
    assert table.get((None, "late")) is not None


def test_tenants_share_no_session_by_giving_it_the_same_name(models: ServedModels) -> None:
    engine = engine_of(models, 40, session_tokens=32, session_idle_s=1e9)
    asked = partial(request, "math", max_tokens=1, session="agent")
    run(engine, [asked(range(10, 30), cache_salt=salt) for salt in ("one", "other")])
    held = engine.stats().blocks_used
    assert engine.stats().sessions == 2
    run(engine, [asked(range(10, 31), cache_salt="other", end_session=True)])
    assert engine.stats().sessions == 1
    assert engine.stats().blocks_used == held // 2
    run(engine, [asked(range(10, 34), cache_salt="one")])
    assert engine.stats().cached_tokens >= 20, "what was promised to the first"
    engine.end_session("agent")
    engine.step()
    assert_nothing_leaks(engine)


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
