"""`benchmarks/eval_speed.py` from its command line to its file, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.evaluation.lm_eval_helpers import make_decoders

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("length", [None, 3])
def test_both_sides_answer_the_same_items(
    tmp_path: Path, shared_data: Path, length: int | None
) -> None:
    folder = make_decoders(tmp_path)
    config = folder / "base" / "config.json"  # real prompts are longer than what the tiny one holds
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048})
    )
    out = tmp_path / "speed.json"
    others = [
        {"task": "gsm8k", "tokens": length},
        {"task": "gsm8k", "tokens": 2, "kept": True},
        {"task": "bfcl_multiple", "tokens": 3, "kept": True},
    ]
    out.write_text(json.dumps({"rows": others}))
    command = [
        *(sys.executable, "benchmarks/eval_speed.py", f"--base={folder / 'base'}"),
        *(f"--decoder={folder / name / 'decoder'}" for name in ("decoder", "full_prompt")),
        *("--items=2", "--rounds=1", "--batch-size=2", "--dtype=float32", "--task=gsm8k"),
        *([] if length is None else [f"--tokens={length}"]),
        *(f"--data={shared_data}", f"--out={out}"),
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    kept = [other for other in rows if "kept" in other]
    assert kept == [others[2], others[1]]
    (row,) = (other for other in rows if "kept" not in other)
    assert (row["task"], row["items"], row["decoders"]) == ("gsm8k", 2, 2)
    seconds, tokens = row["seconds"], row["output_tokens"]
    assert min(seconds.values()) > 0
    assert min(tokens.values()) > 0
    assert tokens["ours, one"] < tokens["ours, all"]
    if length is not None:
        assert tokens == {"HFLM, all": 12, "ours, all": 12, "HFLM, one": 6, "ours, one": 6}
    assert row["all_to_hflm"] == seconds["ours, all"] / seconds["HFLM, all"]
