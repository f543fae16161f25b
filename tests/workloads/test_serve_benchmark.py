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


def test_quick_run_and_ttft_leave_rows_and_tables(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = tiny.config()
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 8192  # sessions of real lengths
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    command = [
        *(sys.executable, "benchmarks/serve.py", "quick", "ttft", f"--model={tmp_path / 'base'}"),
        *(f"--runs={tmp_path / 'runs'}", f"--out={out}", "--traces=none", "--dtype=float32"),
        *("--system-tokens=32", "--quick-sessions=2", "--ttft-prompts=64", "--ttft-contexts=1"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
