"""What single processes can show of several: refusals, shares of the evaluation, clean-up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from tests.training import tiny

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.training.base_weights import shard_base
from prefillshare_train.training.evaluation_batches import COUNTED, EvaluationBatches
from prefillshare_train.training.launch import LaunchError, check_launch, refuse_lone_process
from prefillshare_train.training.trainer import collate


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
