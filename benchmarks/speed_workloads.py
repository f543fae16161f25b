"""What the training benchmark trains on: settings, random rows, and Seal-Tools' own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import step_flops
from prefillshare_train.core.devices import default_device
from prefillshare_train.core.packing import Method, pack
from prefillshare_train.core.spans import Conversation, Turn

DEVICE = default_device()
RULE = BoundaryRule.parse("last_token")
METHODS = ("sft", "prefillshare", "trl", "alora")  # neighbours in time compare best
RANDOM_MODEL = "random-llama"
HEADER = 7  # the one-token assistant header of random rows; it occurs nowhere else in them
DISTRACTORS = 9


@dataclass(frozen=True)
class Case:
    """One setting in which all methods are compared.

    Attributes:
        model: folder of a model, or `RANDOM_MODEL`.
        adapter: `none` (full fine-tuning) or `lora`.
        checkpointing: gradient checkpointing of every layer.
        dtype: of weights and arithmetic, such as `float32`.
    """

    model: str
    adapter: str
    checkpointing: bool
    dtype: str

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that this setting has; aLoRA is an adapter."""
        return tuple(m for m in METHODS if m != "alora" or self.adapter == "lora")

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config(self) -> PreTrainedConfig:
        """Configuration of the model."""
        if self.model != RANDOM_MODEL:
            return AutoConfig.from_pretrained(self.model)
        return LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )


@dataclass(frozen=True)
class Workload:
    """The micro-batches of one pass; a training step repeats the pass.

    Attributes:
        name: `P/R`, or the name of the data set.
        micro_batches: conversations of each micro-batch, one turn a conversation.
    """

    name: str
    micro_batches: tuple[tuple[Conversation, ...], ...]

    @property
    def conversations(self) -> list[Conversation]:
        """All conversations of the pass."""
        return [c for micro_batch in self.micro_batches for c in micro_batch]

    @property
    def response_tokens(self) -> int:
        """Tokens of the pass that carry a loss."""
        return sum(c.response_tokens for c in self.conversations)

    @property
    def largest(self) -> Workload:
        """The micro-batch of the most tokens alone: it sets the peak of memory."""
        batch = max(self.micro_batches, key=lambda rows: sum(len(c.token_ids) for c in rows))
        return Workload(self.name, (batch,))

    @property
    def mean_lengths(self) -> tuple[int, int]:
        """Prompt and response tokens of a conversation, on average."""
        count = len(self.conversations)
        prompts = sum(c.turns[-1].prompt_length for c in self.conversations)
        return round(prompts / count), round(self.response_tokens / count)

    def flops(
        self, method: str, config: PreTrainedConfig, weights: tuple[int, int], case: Case
    ) -> int:
        """FLOPs of the pass, forward and backward.

        Args:
            method: of the benchmark; all but `prefillshare` run the whole prompt.
            config: of the model.
            weights: from `cost.matmul_parameters`.
            case: the setting.
        """
        shape: Method = "prefillshare" if method == "prefillshare" else "full_prompt"
        return sum(
            step_flops(
                pack(rows, RULE, shape)["layout"],
                stack=weights[0],
                head=weights[1],
                config=config,
                trains_base_weights=case.adapter == "none",
                checkpointing=case.checkpointing,
            )
            for rows in self.micro_batches
        )


def random_workload(prompt: int, response: int, rows: int, vocabulary: int) -> Workload:
    """One micro-batch of `rows` random conversations of the same lengths."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, prompt + response)
    ids = torch.randint(HEADER + 1, vocabulary, size, generator=generator)
    ids[:, prompt - 1] = HEADER
    turn = Turn(prompt, prompt + response, 1)
    batch = tuple(Conversation(tuple(row.tolist()), (turn,)) for row in ids)
    return Workload(f"{prompt}/{response}", (batch,))


def seal_tools_workload(folder: Path, model: str, rows: int, micro_batches: int = 3) -> Workload:
    """Seal-Tools requests with ten tools offered, at evenly spaced ranks of their length.

    Micro-batches hold neighbours in length, so that padding costs the methods that pad little.

    Args:
        folder: Seal-Tools files as published.
        model: folder of a model with a tokenizer.
        rows: conversations a micro-batch.
        micro_batches: how many.
    """
    from prefillshare_train.data import build_dataset
    from prefillshare_train.data.config import DataConfig, SourceConfig

    source = SourceConfig(
        source=str(folder / "dev.jsonl"),
        format="seal_tools",
        tools_file=str(folder / "tool.jsonl"),
        distractors=DISTRACTORS,
        sample=200,
    )
    config = DataConfig(
        train=source, eval_fraction=0.0, max_length=8192, chat_template="chatml-tools"
    )
    dataset = build_dataset(config, AutoTokenizer.from_pretrained(model))
    picked = evenly_spaced(dataset.train, rows * micro_batches)
    batches = [tuple(picked[i : i + rows]) for i in range(0, len(picked), rows)]
    return Workload("seal_tools", tuple(batches))


def evenly_spaced(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """`count` conversations, shortest first, at the middles of as many equal shares.

    Raises:
        ValueError: there are fewer conversations than asked for.
    """
    if len(conversations) < count:
        raise ValueError(f"{count} conversations are needed, {len(conversations)} are there")
    ordered = sorted(conversations, key=lambda c: len(c.token_ids))
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
