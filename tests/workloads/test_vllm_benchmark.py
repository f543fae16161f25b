"""`make bench-vllm` and the BFCL comparison: what they make of figures and answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from prefillshare_train.workloads.reuse import Sent, Work

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("vllm_figures")


@pytest.fixture
def bfcl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("vllm_bfcl")


def row(system: str, cap: int, speed: float, **others: Any) -> dict[str, Any]:
    found = {"p50_s": 1.0, "p95_s": 100 / speed, "p99_s": 2.0, "ttft_p50_s": 0.1}
    found |= {"ttft_p95_s": 10 / speed, "hit_ratio": 0.5, "errors": 0, "repeats": 1}
    return {"system": system, "max_sessions": cap, "throughput_tok_s": speed, **found, **others}


PAGE = """\
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{{model_name="base"}} {prompt}.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{{engine="0"}} {hits}.0
vllm:prefix_cache_hits_total{{engine="1"}} 1.0
# TYPE vllm:external_prefix_cache_hits counter
vllm:external_prefix_cache_hits_total 20.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 7.0
"""


def test_counters_are_summed_over_labels_and_others_left_out(figures: Any) -> None:
    assert figures.counts_of(PAGE.format(prompt=100, hits=30)) == {
        "prompt_tokens": 100,
        "prefix_hit_tokens": 31,
        "store_hit_tokens": 20,
    }


def test_tokens_that_were_run_are_those_not_found(figures: Any) -> None:
    pages = [PAGE.format(prompt=100, hits=30), PAGE.format(prompt=400, hits=80)]
    found = figures.difference(*map(figures.counts_of, pages))
    assert found["prompt_tokens"] == 300
    assert found["run_prompt_tokens"] == 300 - 50
    # A counter with labels has no line before it counts.
    assert figures.difference({}, {"steps": 3.0}) == {"steps": 3.0}


def test_whole_blocks_are_found_again_and_their_rest_is_not(figures: Any) -> None:
    before = [Sent("a", tuple(range(9)), None, 1)]  # 8 tokens of the base's, two blocks of 4
    sent = [
        Sent("b", (*range(7), 99, 100), None, 5),  # differs in the second block
        Sent("a", tuple(range(16)), None, 5),
    ]
    shared = figures.block_work(sent, "shared", before, 4)
    assert shared == Work(8 + 15, (8 - 4) + (15 - 8), 10)
    isolated = figures.block_work(sent, "isolated", before, 4)
    assert isolated == Work(8 + 15, 8 + (15 - 8), 10)


def test_bound_takes_each_sides_own_rates(figures: Any) -> None:
    stock, shared = Work(0, 1000, 100), Work(0, 200, 100)
    slow, fast = figures.Rates(1e-3, 2e-3, 1e-2), figures.Rates(5e-4, 9.0, 1e-2)
    assert figures.speed_bound(stock, slow, shared, fast) == pytest.approx(3.0 / 1.1)


def test_comparison_is_of_the_best_caps(figures: Any) -> None:
    work = {
        "shared": {"base_tokens": 0, "prefill_tokens": 100, "decode_tokens": 10},
        "isolated": {"base_tokens": 0, "prefill_tokens": 400, "decode_tokens": 10},
    }
    rows = [
        row("shared", 4, 30.0, work=work),
        row("shared", 8, 40.0, work=work, errors=1),
        row("stock", 4, 16.0, work=work),
        row("stock", 8, 10.0, work=work),
        row("reference", 4, 20.0),
    ]
    rates = {4: figures.Rates(0.01, 0.01, 0.1), 8: figures.Rates(0.01, 0.01, 0.1)}
    found = figures.comparison(figures.best_caps(rows), rates)
    assert found["caps"] == [8, 4]
    assert found["throughput_ratio"] == pytest.approx(2.5)
    assert found["p95_ratio"] == pytest.approx(2.5)
    assert found["throughput_ratio_to_reference"] == pytest.approx(2.0)
    assert found["bound"] == pytest.approx((4.0 + 1.0) / (1.0 + 1.0))
    assert found["bound_share"] == pytest.approx(1.0)
    assert found["errors"] == 1
    assert "bound" not in figures.comparison(figures.best_caps(rows), {4: rates[4]})
    assert figures.comparison(figures.best_caps(rows[:2]), rates) is None


def test_a_lucky_single_run_does_not_win_against_a_median(figures: Any) -> None:
    rows = [
        row("stock", 1, 50.0),
        row("stock", 2, 40.0, repeats=3),
        row("shared", 1, 60.0, repeats=3),
        row("shared", 2, 70.0),
    ]
    found = figures.best_caps(rows)
    assert {system: best["max_sessions"] for system, best in found.items()} == {
        "stock": 2,
        "shared": 1,
    }


def test_repeats_give_medians_and_the_sum_of_errors(figures: Any) -> None:
    repeats = [row("stock", 4, speed, errors=n) for n, speed in enumerate([10.0, 30.0, 20.0])]
    found = figures.merged(repeats)
    assert (found["throughput_tok_s"], found["errors"], found["repeats"]) == (20.0, 3, 3)
    assert found["throughput_range_tok_s"] == [10.0, 30.0]
    assert found["system"] == "stock"


def test_tables_show_the_best_cap_and_the_share_of_the_bound(figures: Any) -> None:
    rows = [row("shared", 4, 30.0), row("shared", 8, 40.0), row("stock", 4, 16.0)]
    result = {
        "loads": rows,
        "rates": {"4": {"base_prefill_s": 1e-3, "adapter_prefill_s": 2e-3, "decode_s": 3e-3}},
        "comparison": {
            **{"caps": [8, 4], "throughput_ratio": 2.5, "p95_ratio": 2.0, "ttft_p95_ratio": 4.0},
            **{"bound": 3.0, "bound_share": 0.8333},
        },
        "client": [],
        "setup": {"machine": "two cores"},
        "note": "one after another",
    }
    text = figures.markdown(result)
    assert "| shared | **8** | 40 |" in text
    assert "| shared | 4 | 30 |" in text
    assert "| 4 | 1 | 2 | 3 |" in text
    assert "83.3 % of that is reached" in text
    assert text.endswith("two cores; one after another\n")


def test_figures_of_vllms_client_are_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    loads = importlib.import_module("vllm_loads")
    told: dict[str, Any] = {
        f"p{q}_{name}_ms": float(q) for q in (50, 95, 99) for name in ("ttft", "tpot", "e2el")
    }
    told |= {"output_throughput": 5.0, "request_throughput": 0.5, "duration": 9.0, "completed": 4}
    found = loads.client_figures(told)
    assert found["p95_s"] == found["ttft_p95_s"] == found["tpot_p95_s"] == 0.095
    assert (found["throughput_tok_s"], found["errors"]) == (5.0, 0)


@pytest.mark.parametrize(
    ("texts", "other", "expected"),
    [
        (["a", "ab", "abc"], "abc", None),
        (["a", "ab", "abc"], "abd", 2),
        (["a", "ab", "ab"], "abc", 2),  # it ends where the other goes on
        (["a", "ab", "abc"], "a", 1),  # the other has ended
        (["a\ufffd", "aé"], "aé", None),  # a character of two tokens
        ([""], "", None),
    ],
)
def test_first_difference(bfcl: Any, texts: list[str], other: str, expected: int | None) -> None:
    assert bfcl.first_difference(texts, other) == expected


def test_a_differing_item_is_a_near_tie_only_below_the_bound(bfcl: Any) -> None:
    judged = {"item_id": "x_1", "output": "one", "correct": True}
    same = bfcl.compared("t", judged, "one", True, None, 1e-3)
    tie = bfcl.compared("t", judged, "two", False, bfcl.Parting(3, 5e-4, True), 1e-3)
    wide = bfcl.compared("t", judged, "two", True, bfcl.Parting(3, 5e-3, True), 1e-3)
    other = bfcl.compared("t", judged, "two", True, bfcl.Parting(3, 5e-4, False), 1e-3)
    assert [r["near_tie"] for r in (tie, wide, other)] == [True, False, False]
    found = bfcl.summary([same, tie, wide, other], 1e-3)
    assert (found["items"], found["same_output"], found["same_verdict"]) == (4, 1, 3)
    assert (found["eval_correct"], found["endpoint_correct"]) == (4, 3)
    assert (found["near_ties"], found["unexplained"]) == (1, ["x_1", "x_1"])
    assert found["differing"] == [tie, wide, other]
