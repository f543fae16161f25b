"""What single processes can show of several: refusals, shares of the evaluation, clean-up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from tests.training import tiny

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract
from prefillshare_train.training import launch
from prefillshare_train.training.base_weights import shard_base
from prefillshare_train.training.evaluation_batches import COUNTED, EvaluationBatches
from prefillshare_train.training.launch import (
    LaunchError,
    check_agreement,
    check_launch,
    refuse_lone_process,
)
from prefillshare_train.training.recipe import RecipeError, load_recipe
from prefillshare_train.training.trainer import CacheConditionedTrainer, collate


def accelerator(made: DistributedType, processes: int, **plugins: Any) -> Any:
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None, **{})
    state.__dict__.update(plugins)
    return SimpleNamespace(distributed_type=made, num_processes=processes, state=state)


def test_ranks_that_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"started 2 processes.*group of 1.*ddp_backend=gloo"):
        check_launch(accelerator(DistributedType.NO, 1))
    check_launch(accelerator(DistributedType.MULTI_CPU, 2))


def test_an_engine_that_is_not_what_was_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match="FSDP was asked for and accelerate made MULTI_CPU"):
        check_launch(accelerator(DistributedType.MULTI_CPU, 2))
    first = SimpleNamespace(fsdp_version=1)
    with pytest.raises(LaunchError, match="fsdp_version: 2"):
        check_launch(accelerator(DistributedType.FSDP, 2, fsdp_plugin=first))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LaunchError, match="use_cpu=false"):
        check_launch(accelerator(DistributedType.MULTI_CPU, 2))


@pytest.mark.parametrize("bf16", ["auto", False])
def test_autocast_that_the_recipe_does_not_ask_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: Any
) -> None:
    recipe = load_recipe([tiny.save_recipe(tmp_path, {"bf16": bf16})]).recipe
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match=r"mixed_precision bf16, and training\.bf16") as error:
        recipe.training_arguments()
    assert "--mixed_precision no" in str(error.value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not recipe.training_arguments().bf16


def test_a_recipe_that_says_nothing_takes_the_launchers_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe([tiny.save_recipe(tmp_path, {})]).recipe
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert recipe.training_arguments().mixed_precision == "bf16"


def test_ranks_over_different_caches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Contract("base", None, "f", {}, {}, "last_token", "float32")
    check_agreement(mine)
    other = dataclasses.asdict(dataclasses.replace(mine, kv_dtype="bfloat16"))
    monkeypatch.setattr(launch, "gather_object", lambda held: [*held, other])
    with pytest.raises(LaunchError, match="kv_dtype is 'float32' on rank 0 and 'bfloat16' on rank"):
        check_agreement(mine)
    with pytest.raises(LaunchError, match="kv_dtype"):
        CacheConditionedTrainer(tiny.lora(), tiny.arguments(tmp_path), contract=mine)


@pytest.mark.parametrize("launched", ["no", "bf16"])
def test_a_recipe_that_asks_for_autocast_has_it_however_it_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str
) -> None:
    recipe = load_recipe([tiny.save_recipe(tmp_path, {"bf16": True})]).recipe
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert recipe.training_arguments().mixed_precision == "bf16"


def test_a_lone_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    refuse_lone_process()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(LaunchError, match="started one"):
        refuse_lone_process()
    monkeypatch.setenv("RANK", "0")
    refuse_lone_process()


def test_a_base_cannot_be_shared_out_without_an_engine_that_shards() -> None:
    with pytest.raises(LaunchError, match="shard_base needs FSDP2 or ZeRO-3"):
        shard_base(tiny.model(), accelerator(DistributedType.MULTI_GPU, 2))


@pytest.mark.parametrize(("rows", "size", "ranks"), [(9, 2, 2), (9, 2, 3), (1, 4, 3), (8, 2, 2)])
def test_each_row_is_evaluated_once_and_ranks_run_as_many_batches(
    rows: int, size: int, ranks: int
) -> None:
    conversations = tiny.conversations(rows)
    rule = BoundaryRule.parse("last_token")
    batches = [
        list(
            EvaluationBatches(
                conversations,
                size,
                rank,
                ranks,
                lambda chosen: collate(chosen, rule=rule, method="prefillshare"),
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    counted = [batch for of_rank in batches for batch in of_rank if batch[COUNTED]]
    assert sum(batch["layout"].conversations for batch in counted) == rows
    labels = torch.cat([batch["labels"][0] for batch in counted])
    assert len(labels) == sum(c.response_tokens for c in conversations)


def test_a_batch_that_is_not_counted_changes_no_figure(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(tmp_path)
    plain = trainer.evaluate()
    batches = list(trainer.get_eval_dataloader())
    filler = {**batches[0], COUNTED: False}
    padded = trainer.evaluation_loop([*batches, filler], "")  # type: ignore[arg-type]
    assert padded.metrics is not None
    assert padded.metrics["eval_loss"] == plain["eval_loss"]
    assert padded.num_samples == 9
