"""`benchmarks/serve.py` from its command line to its files, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tests.data.helpers import tiny_tokenizer
from tests.training import tiny
from transformers import LlamaForCausalLM

from prefillshare_train.workloads.report import KEYS

REPOSITORY = Path(__file__).resolve().parents[2]


def save_base(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    config = tiny.config()
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 8192  # sessions of real lengths
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "benchmarks/serve.py", f"--model={save_base(folder / 'base')}"),
        *(f"--runs={folder / 'runs'}", f"--out={folder / 'out'}"),
        *("--traces=none", "--dtype=float32", "--system-tokens=32", *arguments),
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def measured(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_quick_run_and_ttft_leave_rows_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = measured(
        tmp_path,
        *("quick", "ttft", "--quick-sessions=2", "--ttft-prompts=64", "--ttft-contexts=1"),
    )
    rows = json.loads((out / "serve.json").read_text())
    assert [(row["mode"], row["decoders"], row["errors"]) for row in rows] == [
        ("shared", 4, 0),
        ("isolated", 4, 0),
    ]
    assert all(tuple(row)[: len(KEYS)] == KEYS and row["machine"] for row in rows)
    assert rows[0]["hit_ratio"] > rows[1]["hit_ratio"]
    ttft = json.loads((out / "serve_ttft.json").read_text())
    assert [(row["mode"], row["prompt_tokens"]) for row in ttft] == [
        ("shared", 64),
        ("isolated", 64),
    ]
    text = (out / "serve.md").read_text()
    assert "## Quick run" in text
    assert "## TTFT on an unchanged context" in text
    assert text in done.stdout


def test_sessions_with_documents_stand_beside_those_without(tmp_path: Path) -> None:
    path = tmp_path / "out" / "serve.json"
    other = {"experiment": "compare", "workload": "react", "regime": "memory", "mode": "shared"}
    small = ("compare", "--workloads=react", "--regimes=memory", "--memory-sessions=1")
    small += ("--caps=1", "--sessions=1", "--warm-up=0", "--repeats=1", "--loads=0.9")
    measured(tmp_path, *small)
    without = json.loads(path.read_text())
    measured(tmp_path, *small, "--context-tokens=4000")
    rows = json.loads(path.read_text())
    assert rows[: len(without)] == without
    assert {row["variant"] for row in without} == {""}
    added = rows[len(without) :]
    assert {row["variant"] for row in added} == {"document 4000"}
    assert any(other.items() <= row.items() for row in added)
    for row, plain in zip(added, without, strict=True):
        longer = row["prefilled_tokens"] - plain["prefilled_tokens"]
        copies = 1 if row["mode"] == "shared" else 2
        # The draw of a document moves those of the rest, which is 2,000 tokens at most here.
        assert longer > copies * 2000, row["mode"]
        assert row["kv_bytes"] > plain["kv_bytes"]


def test_a_document_that_an_experiment_would_not_read_is_refused(tmp_path: Path) -> None:
    refused = run(tmp_path, "compare", "one-decoder", "--context-tokens=64")
    assert refused.returncode == 2
    assert "--context-tokens is compare's alone" in refused.stderr
    assert not (tmp_path / "out").exists()
