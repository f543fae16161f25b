"""The memory estimate counts what lives through a step."""

from __future__ import annotations

import pytest
from tests.training import tiny

from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.dry_run import estimate_memory
from prefillshare_train.training.recipe import parse_recipe


def estimate(**changes: object) -> dict[str, int]:
    recipe = parse_recipe(
        {
            "base": {"model": "m", "dtype": "bfloat16"},
            "data": {"train": {"source": "r"}},
            "training": {"output_dir": "o"},
            "decoder": {"adapter": "none", "dtype": "float32"},
            **changes,
        }
    )
    rows = [Conversation(tuple(range(n)), (Turn(n - 3, n),)) for n in (20, 11)]
    return estimate_memory(recipe, tiny.config(), rows)


def test_full_fine_tuning_has_a_second_copy() -> None:
    found = estimate()
    parameters = sum(p.numel() for p in tiny.model().parameters())
    assert found["base"] == 2 * parameters
    assert found["trained parameters"] == found["gradients"] == 4 * parameters
    assert found["optimizer (AdamW)"] == 8 * parameters
    config = tiny.config()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 8 * 2
    assert found["prompt cache"] == (16 + 7) * token


def test_full_prompt_has_neither_base_nor_cache() -> None:
    found = estimate(method="full_prompt")
    assert found["base"] == found["prompt cache"] == 0


@pytest.mark.parametrize("rank", [4, 8])
def test_lora_trains_its_adapters_only(rank: int) -> None:
    lora = {"r": rank, "target_modules": "all-linear"}
    found = estimate(decoder={"adapter": "lora", "lora": lora})
    trained = sum(p.numel() for p in tiny.lora(r=rank).parameters() if p.requires_grad)
    assert found["trained parameters"] == 4 * trained
    assert found["optimizer (AdamW)"] == 8 * trained
