"""The memory estimate: parts that can be counted by hand, and a simulation that sees the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core import devices, kernels
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.estimate import (
    PARALLEL,
    estimate_memory,
    model_sizes,
    prefill_chunk_tokens,
    step_memory,
)
from prefillshare_train.training.recipe import Recipe, parse_recipe
from prefillshare_train.training.step_memory import StepMemory


def recipe_with(training: dict[str, Any] | None = None, **changes: object) -> Recipe:
    return parse_recipe(
        {
            "base": {"model": "m", "dtype": "bfloat16"},
            "data": {"train": {"source": "r"}},
            "training": {"output_dir": "o", "use_cpu": True, **(training or {})},
            "decoder": {"adapter": "none", "dtype": "float32"},
            **changes,
        }
    )


def simulate(recipe: Recipe, lengths: tuple[int, ...] = (20, 11), **options: Any) -> StepMemory:
    rows = [Conversation(tuple(range(n)), (Turn(n - 3, n),)) for n in lengths]
    arguments = recipe.training_arguments()
    accelerator = options.get("accelerator", False)
    config = options.get("config", tiny.config())
    return step_memory(recipe, arguments, config, rows, accelerator=accelerator)


def estimate(recipe: Recipe, parallel: str = "one_gpu", ranks: int = 1) -> dict[str, int]:
    sizes = model_sizes(recipe, tiny.config())
    step = StepMemory(prompt_cache=1000, prefill=10, activations=500, with_gradients=700)
    arguments = recipe.training_arguments()
    return estimate_memory(recipe, arguments, sizes, step, parallel=parallel, ranks=ranks)


PARAMETERS = sum(p.numel() for p in tiny.model().parameters())
LORA = {"adapter": "lora", "lora": {"r": 4, "target_modules": "all-linear"}}


def test_full_fine_tuning_has_a_second_copy() -> None:
    found = estimate(recipe_with({"gradient_accumulation_steps": 2}))
    assert found["base"] == 2 * PARAMETERS
    assert found["trained parameters"] == found["gradients"] == 4 * PARAMETERS
    assert found["optimizer (AdamW)"] == 8 * PARAMETERS
    assert (found["prompt cache"], found["activations"]) == (1000, 500)


def test_full_prompt_has_neither_base_nor_cache() -> None:
    recipe = recipe_with(method="full_prompt")
    assert estimate(recipe)["base"] == 0
    assert simulate(recipe).prompt_cache == 0


@pytest.mark.parametrize("rank", [4, 8])
def test_lora_trains_its_adapters_only(rank: int) -> None:
    lora = {"r": rank, "target_modules": "all-linear"}
    found = estimate(recipe_with(decoder={"adapter": "lora", "lora": lora}))
    trained = sum(p.numel() for p in tiny.lora(r=rank).parameters() if p.requires_grad)
    assert found["trained parameters"] == 4 * trained
    assert found["optimizer (AdamW)"] == 8 * trained


def test_what_each_parallel_configuration_shares_out() -> None:
    half = {"bf16": True, "gradient_accumulation_steps": 2}
    found = {name: estimate(recipe_with(half), name, 4) for name in PARALLEL}
    share = {name: column["optimizer (AdamW)"] / PARAMETERS for name, column in found.items()}
    # Two moments, and under DeepSpeed the float32 weights that its half precision trains over.
    assert (share["ddp"], share["fsdp2"], share["zero2"], share["zero3"]) == (8, 2, 3, 3)
    assert found["zero2"]["trained parameters"] == 2 * PARAMETERS
    assert found["zero3"]["trained parameters"] == PARAMETERS // 2
    assert found["fsdp2"]["base"] == 2 * PARAMETERS, "the base is whole unless shared out"
    shared = estimate(recipe_with({**half, "shard_base": True}), "fsdp2", 4)
    assert shared["base"] == PARAMETERS // 2
    assert estimate(recipe_with(half, decoder=LORA), "zero3", 4)["base"] == PARAMETERS // 2
    assert found["zero3_offload"]["optimizer (AdamW)"] == 0


def test_the_simulation_counts_the_prompt_cache() -> None:
    config = tiny.config()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 8 * 2
    assert simulate(recipe_with()).prompt_cache == (16 + 7) * token


def test_the_simulation_sees_what_saves_memory() -> None:
    long = (400, 400)
    plain = simulate(recipe_with(), long)
    assert simulate(recipe_with(), (800, 800)).prefill > 1.5 * plain.prefill
    baseline = simulate(recipe_with(method="full_prompt"), long)
    assert baseline.activations > 5 * plain.activations, "a prompt is stored for no backward pass"
    checkpointed = recipe_with({"activation_checkpointing": True}, method="full_prompt")
    assert simulate(checkpointed, long).activations < 0.7 * baseline.activations
    chunked = recipe_with({"prefill_memory_mib": 0.1, "share_prefix_from": 0})
    wide = tiny.config()
    wide.intermediate_size = 2000  # else attention's scores, a block at a time, are what is highest
    whole = simulate(recipe_with(), long, config=wide)
    assert simulate(chunked, long, config=wide).prefill < 0.6 * whole.prefill
    fused = simulate(recipe_with(method="full_prompt"), long, accelerator=True)
    assert fused.activations < baseline.activations


@pytest.mark.parametrize("budget", [None, 0.1])
def test_no_route_of_a_cpu_is_counted_for_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, budget: float | None
) -> None:
    for route in ("_attend_blocks", "_attend_sdpa"):
        monkeypatch.setattr(kernels, route, lambda *_: pytest.fail("a route of the CPU ran"))
    chunked = recipe_with({"prefill_memory_mib": budget, "share_prefix_from": 0})
    assert simulate(chunked, (400, 400), accelerator=True).prefill > 0


def test_autocasts_copies_of_weights_are_counted_where_they_are_made() -> None:
    recipe = recipe_with({"bf16": True})
    rows = [Conversation(tuple(range(30)), (Turn(20, 30),))]
    alone, sharded = (
        step_memory(
            recipe,
            recipe.training_arguments(),
            tiny.config(),
            rows,
            accelerator=True,
            parallel=name,
        )
        for name in ("ddp", "fsdp2")
    )
    matrices = sum(p.numel() for p in tiny.model().model.layers.parameters() if p.dim() > 1)
    assert alone.activations - sharded.activations > 1.5 * matrices, "two bytes a weight"


def test_deeper_models_are_a_straight_line() -> None:
    deep = tiny.config()
    recipe, rows = recipe_with(), [Conversation(tuple(range(90)), (Turn(60, 90),))]
    found = []
    for layers in (4, 6, 8):
        deep.num_hidden_layers = layers
        step = step_memory(recipe, recipe.training_arguments(), deep, rows, accelerator=False)
        found.append(step.activations)
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], abs=2)


@pytest.mark.parametrize(
    ("said", "counted", "hinted"),
    [("auto", "float32", True), ("bfloat16", "bfloat16", False), ("float32", "float32", False)],
)
def test_the_command_says_which_dtype_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, counted: str, hinted: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_fast_products", lambda dtype, device: False)
    recipe = tiny.save_recipe(tmp_path, {"bf16": "auto", "use_cpu": True})
    dtype = f"base.dtype={said}"
    mixed = "bf16" if counted == "bfloat16" else "no"
    for command in (["estimate", "--gpus", "2"], ["train", "--dry-run"]):
        result = CliRunner().invoke(app, [*command, str(recipe), dtype])
        assert result.exit_code == 0, result.output
        assert f"counted with base.dtype {counted}, mixed precision {mixed}" in result.output
        assert ("set base.dtype=bfloat16" in result.output) == hinted


def test_a_larger_budget_runs_larger_chunks() -> None:
    small, large = (prefill_chunk_tokens(b, tiny.model(), None) for b in (0.5, 5.0))
    assert 64 <= small < large
    assert prefill_chunk_tokens(0.0001, tiny.model(), None) == 64
