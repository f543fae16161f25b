"""What a recipe may say about data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FormatName = Literal[
    "auto",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "metamath",
    "evol_instruct_code",
    "xlam",
    "gsm8k",
    "mbpp",
    "seal_tools",
    "react",
]


@dataclass(kw_only=True)
class SourceConfig:
    """Where rows come from and how to read them."""

    source: str
    """A JSON, JSONL (either may be gzipped) or Parquet file, a directory of such files, a directory
    written by `datasets.save_to_disk`, or the id of a hub data set. A relative path is looked up
    from the current directory first, then from the recipe's."""
    format: FormatName = "auto"
    """What the columns mean. `auto` decides by the column names; `react` is never chosen by `auto`,
    since its columns are those of `alpaca`."""
    split: str | None = None
    """Which split of a hub data set or of a directory (files whose names start with it). `train`
    where there is one and none is named."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set. Name a commit to make a run repeatable."""
    sample: int | None = None
    """Take at most this many rows, drawn at random with `data.seed`; null takes all."""
    tools_file: str | None = None
    """`seal_tools` only: the JSONL file of API specifications that the rows call."""
    distractors: int = 0
    """`seal_tools` only: how many tools that the row does not call are offered beside those it
    does, drawn with `data.seed` row by row."""

    columns: dict[str, str] | None = None
    """Renames columns before the format is decided: `{prompt: question, completion: solution}`
    reads the column `question` as the prompt and `solution` as the completion."""

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be 1 or more, or null; found {self.sample}")
        if self.distractors < 0:
            raise ValueError(f"distractors must be 0 or more; found {self.distractors}")


@dataclass(kw_only=True)
class DataConfig:
    """Rows to train and evaluate on, and how they become tokens."""

    train: SourceConfig
    """Where the training rows come from."""
    eval: SourceConfig | None = None
    """Where the evaluation rows come from; null splits them off the training rows."""
    eval_fraction: float = 0.05
    """Share of the training rows to hold out where `eval` is null. Rows with equal prompts stay on
    the same side. 0 trains without evaluation."""
    eval_max_rows: int | None = 500
    """Evaluate on at most this many rows, drawn at random; null takes all."""
    max_length: int = 1024
    """Longest conversation in tokens, prompt and response together."""
    overlong: Literal["drop", "error"] = "drop"
    """What to do with turns that end past `max_length`: `drop` leaves them out and counts them,
    `error` refuses the data. Nothing is ever cut short."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Train every assistant turn, or only the last of each conversation. A message with `weight: 0`
    is never trained."""
    chat_template: str | None = None
    """A `.jinja` file, or the name of a packaged template such as `chatml-tools`, in place of the
    tokenizer's own chat template."""
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    """Further arguments of the chat template, such as `enable_thinking: false` for Qwen3."""
    prompt_template: str | None = None
    """For base checkpoints without a chat template: a packaged prompt template (`alpaca`,
    `question_answer`, `plain`) or a `.jinja` file. It adds BOS where the tokenizer would, and ends
    each response with EOS."""
    system_prompt: str | None = None
    """System message for rows that have none of their own."""
    dedupe: bool = True
    """Keep only the first of conversations with equal tokens, and no training conversation that is
    also evaluated."""
    shuffle_seed: int = 0
    """Seed of the order of the training conversations."""
    seed: int = 0
    """Seed of sampling, of the split and of distractor tools."""

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1); found {self.eval_fraction}")
        if self.eval_max_rows is not None and self.eval_max_rows < 1:
            raise ValueError(f"eval_max_rows must be 1 or more; found {self.eval_max_rows}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be 2 or more; found {self.max_length}")
        if self.chat_template is not None and self.prompt_template is not None:
            raise ValueError(
                "chat_template and prompt_template are both set; keep prompt_template for base "
                "checkpoints without a chat template, chat_template for all others"
            )
        if self.chat_template_kwargs and self.prompt_template is not None:
            raise ValueError("chat_template_kwargs has no effect on a prompt_template; drop one")
