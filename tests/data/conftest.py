"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefillshare_train.data import DataConfig, PreparedData, SourceConfig, build_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / ".cache" / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tiny, with a ChatML template; its pad token is its EOS."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerBase:
    """That of SmolLM2-135M-Instruct; skips where `make model` was not run."""
    if not (MODEL / "tokenizer.json").is_file():
        pytest.skip(f"the model folder {MODEL} is absent; run `make model`")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreparedData]:
    """`build_dataset` on rows written to files; `source` goes to the training source."""

    def run(
        rows: list[Any],
        eval_rows: list[Any] | None = None,
        *,
        source: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase = tokenizer,
        **config: Any,
    ) -> PreparedData:
        train = str(write_jsonl(tmp_path / "train.jsonl", rows))
        held_out = None
        if eval_rows is not None:
            held_out = SourceConfig(source=str(write_jsonl(tmp_path / "eval.jsonl", eval_rows)))
        return build_dataset(
            DataConfig(train=SourceConfig(source=train, **(source or {})), eval=held_out, **config),
            tokenizer,
        )

    return run
