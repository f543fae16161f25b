"""Prompts to generate from, and what transformers makes of them."""

from __future__ import annotations

from typing import Any

import torch
from tests.core import families
from transformers import (
    PreTrainedModel,
)

from prefillshare_train.core.boundary import BoundaryRule

PROMPT_LENGTHS = (3, 17, 33, 17, 50)
NEW = 20


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, families.VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS
    ]


def cut(rows: list[list[int]], rule: str = "last_token") -> list[list[int]]:
    parsed = BoundaryRule.parse(rule)
    return [ids[: parsed.base_length(len(ids), 2)] for ids in rows]


def plainly(model: PreTrainedModel, ids: list[int], **options: Any) -> list[int]:
    """What transformers' own generate answers, greedily."""
    output = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **({"eos_token_id": None} | options),
    )
    answer: list[int] = output[0, len(ids) :].tolist()
    return answer
