"""Figures, rows, gains, tables and plots, on records that these tests write."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.fakes import FakeEngine

from prefillshare_train.workloads import plots
from prefillshare_train.workloads.driver import LoadResult, RequestRecord, SessionRecord
from prefillshare_train.workloads.metrics import Objectives, figures, percentiles
from prefillshare_train.workloads.plots import plot_gain_map, plot_lines, plot_loads
from prefillshare_train.workloads.points import LoadPoint
from prefillshare_train.workloads.report import KEYS, best, gains, markdown, rows_of
from prefillshare_train.workloads.reuse import Work

REQUEST = RequestRecord("s", 0, "a", 0.0, 1.0, 0.1, 2.0, 11, 101, 100, 60, 0, None)
WORK = {"shared": Work(300, 60, 22), "isolated": Work(300, 180, 22)}


def load(requests: list[RequestRecord], **options: Any) -> LoadResult:
    sessions = [
        SessionRecord("s", 1.0, 2.0, 5.0, 2, None),
        SessionRecord("t", 1.0, 3.0, 7.0, 2, None),
        SessionRecord("u", 1.0, 3.0, 99.0, 1, "broke"),
    ]
    return LoadResult(requests, sessions, duration_s=10.0, **options)


def test_figures_of_a_load() -> None:
    failed = replace(REQUEST, error="x", ttft_s=None, cached_tokens=None, completion_tokens=0)
    slow = replace(REQUEST, ttft_s=5.0, total_s=8.0, cached_tokens=90, retries=2)
    engine = FakeEngine()
    before = engine.stats()
    after = replace(
        before,
        prefilled_tokens=50,
        prefill_seconds=5.0,
        completion_tokens=22,
        decode_seconds=11.0,
        decode_steps=10,
        decode_rows=30,
        staged_out_bytes=7,
        staged_in_bytes=8,
    )
    found = figures(
        load([REQUEST, slow, failed], before=before, after=after), WORK, Objectives(2.0, 0.2)
    )
    assert found["throughput_tok_s"] == pytest.approx(2.2)
    assert found["requests_per_s"] == pytest.approx(0.2)
    # Sessions that failed have no latency; the wait to be let in belongs to it.
    assert found["p50_s"] == pytest.approx(5.0)
    assert found["p99_s"] == pytest.approx(5.98)
    assert found["request_p50_s"] == pytest.approx(5.0)
    assert found["ttft_p95_s"] == pytest.approx(4.8)
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["goodput_requests_per_s"] == pytest.approx(0.1)
    assert found["hit_ratio"] == pytest.approx(150 / 200)
    assert (found["errors"], found["retries"], found["requests"]) == (1, 2, 3)
    assert found["staged_bytes"] == 15
    assert found["decode_rows_per_step"] == 3
    assert found["hit_ratio_max_by_mode"] == pytest.approx({"shared": 0.8, "isolated": 0.4})
    # 0.1 s a prefilled token, 0.5 s a decoded one.
    assert found["bound"] == pytest.approx((18 + 11) / (6 + 11))


def test_a_request_without_a_second_token_has_no_tpot_to_miss() -> None:
    limits = Objectives(2.0, 0.2)
    assert limits.met(replace(REQUEST, tpot_s=None))
    assert not limits.met(replace(REQUEST, tpot_s=0.3))
    assert not limits.met(replace(REQUEST, ttft_s=2.1))
    assert not limits.met(replace(REQUEST, error="x"))


def test_over_http_what_is_not_known_is_none() -> None:
    plain = replace(REQUEST, base_tokens=None)
    found = figures(load([plain]), None, Objectives())
    assert found["hit_ratio"] == pytest.approx(60 / 101)
    assert found["peak_kv_bytes"] is None
    assert "bound" not in found
    unknown = replace(REQUEST, cached_tokens=None)
    assert figures(load([unknown]), None, Objectives())["hit_ratio"] is None


def test_percentiles_of_nothing() -> None:
    assert percentiles("x_", []) == {"x_p50_s": None, "x_p95_s": None, "x_p99_s": None}


POINT = LoadPoint("compare", "react", "memory", "shared", 4, 0.5, 8, sessions=10)


def numbers(throughput: float, p95: float = 4.0, bound: float = 2.0, **more: Any) -> dict[str, Any]:
    base = figures(load([REQUEST]), None, Objectives())
    return {
        **base,
        "throughput_tok_s": throughput,
        "p95_s": p95,
        "bound": bound,
        "hit_ratio_max_by_mode": {"shared": 0.9, "isolated": 0.6},
        "machine": "a machine",
        **more,
    }


def example() -> list[dict[str, Any]]:
    isolated = replace(POINT, mode="isolated", max_sessions=4)
    worse = replace(POINT, mode="isolated", max_sessions=8)
    return rows_of(
        {
            POINT: numbers(30.0, 2.0),
            replace(POINT, repeat=1): numbers(50.0, 4.0, bound=2.5, errors=3),
            replace(POINT, repeat=2): numbers(40.0, 3.0),
            isolated: numbers(10.0, 9.0, bound=7.0),
            worse: numbers(5.0, 20.0, bound=7.0),
        }
    )


def test_rows_are_medians_over_repeats_with_the_agreed_keys() -> None:
    shared, isolated, _ = example()
    assert tuple(shared)[: len(KEYS)] == KEYS
    assert (shared["throughput_tok_s"], shared["p95_s"], shared["bound"]) == (40.0, 3.0, 2.0)
    assert shared["errors"] == 3  # a sum: errors are not averaged away
    assert shared["repeats"] == 3
    assert (shared["hit_ratio_max"], isolated["hit_ratio_max"]) == (0.9, 0.6)
    assert isolated["bound"] == 2.0  # at the shared side's rates
    json.dumps(example(), allow_nan=False)


def test_gains_compare_each_side_at_its_best_cap() -> None:
    rows = example()
    [gain] = gains(rows)
    assert gain["throughput_ratio"] == pytest.approx(4.0)
    assert gain["p95_ratio"] == pytest.approx(3.0)
    assert (gain["max_sessions_shared"], gain["max_sessions_isolated"]) == (8, 4)
    assert gain["bound_share"] == pytest.approx(2.0)
    assert gains(rows[:1]) == []
    assert best([]) is None


def test_tokens_of_calls_that_failed_are_no_throughput() -> None:
    cut_off = replace(REQUEST, error="x", completion_tokens=7)
    assert figures(load([REQUEST, cut_off]), None, Objectives())["throughput_tok_s"] == 1.1


def test_a_side_whose_calls_all_failed_has_rows_and_no_gain() -> None:
    isolated = replace(POINT, mode="isolated")
    rows = rows_of({POINT: numbers(30.0), isolated: numbers(0.0, errors=9)})
    [gain] = gains(rows)
    assert (gain["throughput_ratio"], gain["bound_share"], gain["errors"]) == (None, None, 9)
    assert "| react | memory | 4 | 0.5 | 8 / 8 | – |" in markdown(rows, "TTFT within 2 s")


def test_a_cap_without_errors_is_better_than_a_faster_one_with_some() -> None:
    isolated, more = (replace(POINT, mode="isolated", max_sessions=cap) for cap in (4, 8))
    found = {POINT: numbers(30.0), isolated: numbers(10.0), more: numbers(50.0, errors=1)}
    [gain] = gains(rows_of(found))
    assert (gain["max_sessions_isolated"], gain["errors"]) == (4, 0)


def test_loads_of_other_rates_are_not_compared() -> None:
    other = replace(POINT, mode="isolated", sessions_per_s=0.7)
    assert gains(rows_of({POINT: numbers(1.0), other: numbers(1.0)})) == []


def test_tables_show_figures_and_machine() -> None:
    text = markdown(example(), "TTFT within 2 s")
    lines = text.splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 2  # two tables, each with lines of one width
    assert "| react | memory | shared | 4 | 0.5 | 8 | 40 |" in text
    assert "| react | memory | 4 | 0.5 | 8 / 4 | 4 | 3 |" in text
    assert "TTFT within 2 s" in text
    assert lines[-1] == "a machine"


def test_tables_show_where_the_time_went() -> None:
    engine = {
        "duration_s": 20.0,
        "prefilled_tokens": 1000,
        "prefill_s_per_token": 0.005,
        "decode_s_per_token": 0.02,
    }
    text = markdown(rows_of({POINT: numbers(30.0, **engine)}), "TTFT within 2 s")
    # 5 s of prefill, 600 tokens in 12 s, and 3 s of neither
    assert "| 1000 | 25.0 % | 5 | 60.0 % | 20 | 15.0 % |" in text


def test_several_machines_are_named_with_what_they_ran() -> None:
    one = rows_of({POINT: numbers(30.0) | {"machine": "a laptop"}})
    other = rows_of({replace(POINT, variant="document 9"): numbers(9.0) | {"machine": "a server"}})
    assert markdown(one, "").splitlines()[-1] == "a laptop"
    assert markdown(one + other, "").splitlines()[-2:] == [
        "- react, memory: a laptop",
        "- react document 9, memory: a server",
    ]


def test_a_variant_looks_alike_in_every_panel_and_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, stem: drawn.append(figure) or [])
    found = {}
    for cap in (2, 4):
        for regime, variant in (("compute", ""), ("memory", "document 9")):
            options = {"max_sessions": cap, "regime": regime, "variant": variant}
            found[dataclasses.replace(POINT, **options)] = numbers(30.0)
    plot_loads(rows_of(found), tmp_path, "serve")
    (figure,) = drawn
    legend = {
        text.get_text(): line.get_linestyle()
        for text, line in zip(
            figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True
        )
    }
    assert legend == {"shared": "-", "shared document 9": "--"}
    for axes in figure.axes:
        plain = axes.get_title().split(",")[1].startswith(" compute")
        assert {line.get_linestyle() for line in axes.get_lines()} == {"-" if plain else "--"}


def test_plots_are_written_for_axes_that_vary(tmp_path: Path) -> None:
    found = {}
    for rate in (0.2, 0.5):
        for mode in ("shared", "isolated"):
            point = dataclasses.replace(POINT, sessions_per_s=rate, mode=mode)
            found[point] = numbers(30 * rate)
    paths = plot_loads(rows_of(found), tmp_path, "serve")
    assert [p.name for p in paths] == ["serve_sessions_per_s.png", "serve_sessions_per_s.svg"]
    paths += plot_gain_map({1: {(8, 2): 1.0}, 4: {(8, 2): 2.0, (16, 2): 3.0}}, tmp_path / "map")
    paths += plot_lines({"a": [(2, 1), (1, 2)]}, ("x", "y"), tmp_path / "lines")
    assert all(path.stat().st_size > 1000 for path in paths)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
