"""`benchmarks/multi_decoder.py` on a tiny model: what it runs, counts and writes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.training.tiny import save_base

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("multi_decoder")


def test_a_row_says_what_one_prefill_saved_and_what_it_could(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base")
    out = tmp_path / "rows.json"
    words = f"--model {tmp_path / 'base'} --out {out} --decoders 3 --prompt 12 --response 4"
    words += " --steps 3 --rounds 1 --setting float32:2"
    monkeypatch.setattr(sys, "argv", ["multi_decoder.py", *words.split()])
    monkeypatch.chdir(tmp_path)
    prefills = []
    run = bench.SharedPrefill.new_round
    monkeypatch.setattr(
        bench.SharedPrefill, "new_round", lambda one: prefills.append(one.ran) or run(one)
    )
    bench.main()

    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["dtype"], row["batch"]) == ("float32", 2)
    # The base runs all of a prompt but its last token, once for the three decoders of a round.
    assert prefills[:3] == [22, 44, 66]
    assert row["speedup"] == pytest.approx(row["separate_s"] / row["together_s"])
    assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["bound"])
    assert 1 < row["bound"] < 3


def test_the_bound_lets_the_prefill_run_once(bench: Any) -> None:
    assert bench.Flops(prefill=10, decoder=5).bound(4) == pytest.approx(4 * 15 / (10 + 4 * 5))


@pytest.mark.parametrize("text", ["float32", "float16:4", "float32:0", "bfloat16:x"])
def test_a_setting_that_is_none_is_refused(bench: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        bench.Setting.parse(text)
