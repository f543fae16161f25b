"""The trainer: what it trains, what it leaves alone, and that nothing depends on the split."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.core import families
from tests.training import tiny

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import CONTRACT_NAME, Contract, weights_fingerprint
from prefillshare_train.core.modules import causal_lm_of
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.held_out import held_out_loss
from prefillshare_train.training.trainer import (
    CacheConditionedTrainer,
    TrainingDivergedError,
    collate,
)


def test_one_by_eight_equals_eight_by_one(tmp_path: Path) -> None:
    curves = []
    for batch, accumulation in ((1, 8), (8, 1), (2, 4)):
        trainer = tiny.full_trainer(
            tmp_path / f"{batch}",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        curves.append(tiny.losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[2] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][0] != pytest.approx(curves[0][2], rel=1e-3), "nothing was learned"


@pytest.mark.parametrize("method", ["prefillshare", "full_prompt"])
def test_step_zero_is_the_ordinary_sft_loss(tmp_path: Path, method: str) -> None:
    trainer = tiny.full_trainer(tmp_path, method=method)
    rows = tiny.conversations(5)
    batch = collate(rows, rule=BoundaryRule.parse("last_token"), method=method)  # type: ignore[arg-type]
    loss = trainer.compute_loss(trainer.model, batch)
    model = causal_lm_of(trainer.model)
    model.set_attn_implementation("sdpa")
    nll, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.token_ids])).logits[0]
        for turn in row.turns:
            targets = torch.tensor(row.token_ids[turn.prompt_length : turn.end])
            nll += F.cross_entropy(
                logits[turn.prompt_length - 1 : turn.end - 1], targets, reduction="sum"
            )
            count += len(targets)
    assert loss.item() == pytest.approx((nll / count).item(), rel=1e-5)


def test_the_base_stays_as_it_was_and_out_of_the_optimizer(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(tmp_path)
    assert trainer.prefill is not None
    base = trainer.prefill.causal_lm
    before = {name: p.clone() for name, p in base.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in base.parameters()}
    moved = dict(trainer.model.named_parameters())
    assert any(not torch.equal(moved[name], value) for name, value in before.items())


def test_a_lora_decoder_shares_its_base_and_leaves_it_bit_identical(tmp_path: Path) -> None:
    model = tiny.lora()
    before = weights_fingerprint(causal_lm_of(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = CacheConditionedTrainer(
        model,
        tiny.arguments(tmp_path, max_steps=40, learning_rate=3e-2),
        train_dataset=tiny.conversations(24),
        eval_dataset=tiny.conversations(24),
    )
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert weights_fingerprint(causal_lm_of(model)) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert trainer.evaluate()["eval_loss"] < untrained - 0.05


def test_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    curves = []
    for on in (False, True):
        trainer = tiny.full_trainer(tmp_path / str(on), gradient_checkpointing=on)
        trainer.train()
        curves.append(tiny.losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_evaluation_is_weighted_by_tokens(tmp_path: Path) -> None:
    found = []
    for batch in (1, 4):
        trainer = tiny.full_trainer(tmp_path / str(batch), per_device_eval_batch_size=batch)
        found.append(trainer.evaluate())
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)
    assert found[0]["eval_perplexity"] == pytest.approx(math.exp(found[0]["eval_loss"]), rel=1e-5)
    assert 0 <= found[0]["eval_token_accuracy"] <= 1
    apart = held_out_loss(
        trainer.model,
        tiny.conversations(9, seed=5),
        prefill=trainer.prefill,
        rule=trainer.rule,
        batch_size=3,
    )
    assert apart == pytest.approx(found[0]["eval_loss"], rel=1e-6)


def test_evaluation_leaves_every_module_in_its_mode(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(tmp_path)
    trainer.model.train()
    causal_lm_of(trainer.model).model.layers[0].eval()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    rows = tiny.conversations(3)
    held_out_loss(trainer.model, rows, prefill=trainer.prefill, rule=trainer.rule)
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes
    trainer.evaluate()
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes


def test_what_is_logged(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(tmp_path, peak_tflops=1.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    for key in ("response_tokens_per_s", "prompt_tokens_per_s", "tokens_per_s", "tflops", "mfu"):
        assert entry[key] >= 0
    assert entry["padding_share"] == 0.0
    assert 0.3 < entry["base_token_share"] < 1
    assert entry["peak_memory_mib"] > 10


def test_the_peak_can_be_measured_and_moves_no_draw(tmp_path: Path) -> None:
    plain, measured = (
        tiny.full_trainer(tmp_path / str(given), measure_peak=given) for given in (False, True)
    )
    state = torch.get_rng_state()
    peak = measured._measured_peak()
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e-4 < peak < 1e3
    for trainer in (plain, measured):
        trainer.train()
    first, second = (trainer.state.log_history[0] for trainer in (plain, measured))
    assert first["loss"] == second["loss"]
    assert "mfu" not in first
    assert second["mfu"] > 0


def test_products_run_in_bfloat16_where_asked(tmp_path: Path) -> None:
    plain = tiny.full_trainer(tmp_path / "plain", max_steps=3)
    mixed = tiny.full_trainer(tmp_path / "mixed", max_steps=3, bf16=True)
    for trainer in (plain, mixed):
        trainer.train()
    exact, rounded = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (plain, mixed)
    )
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}


def test_gradients_are_clipped_where_asked(tmp_path: Path) -> None:
    """By plain gradient descent, whose first step is as long as the gradient."""
    moved = []
    for limit in (0.0, 0.01):
        options = {"max_grad_norm": limit, "optim": "sgd", "learning_rate": 1.0}
        options |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 1}
        trainer = tiny.full_trainer(tmp_path / str(limit), **options)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        change = [(a - b).norm() for a, b in zip(after, before, strict=True)]
        moved.append(torch.stack(change).norm().item())
    assert moved[0] > 0.02
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


def test_shared_beginnings_are_prefilled_once_and_chunks_change_nothing(tmp_path: Path) -> None:
    system = tuple(range(3, 43))
    rows = [
        Conversation((*system, *row.token_ids), (Turn(40 + t.prompt_length, 40 + t.end),))
        for row in tiny.conversations(12)
        for t in row.turns[:1]
    ]
    curves, shares = [], []
    for name, options in (
        ("plain", {"share_prefix_from": 0}),
        ("shared", {"share_prefix_from": 16}),
        ("chunked", {"share_prefix_from": 0, "prefill_memory_mib": 1e-6}),
        ("offloaded", {"offload_prompt_cache": True, "activation_checkpointing": True}),
    ):
        trainer = CacheConditionedTrainer(
            tiny.lora(), tiny.arguments(tmp_path / name, **options), train_dataset=rows
        )
        trainer.train()
        curves.append(tiny.losses(trainer))
        shares.append(trainer.state.log_history[0]["shared_prefix_share"])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
    assert shares[0] == shares[2] == shares[3] == 0
    assert 0.3 < shares[1] < 0.5, "one of two prompts takes its 40 tokens over"


def test_offloading_without_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs activation_checkpointing"):
        tiny.arguments(tmp_path, offload_prompt_cache=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = tiny.full_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    steps: list[int] = []
    plain = trainer.compute_loss

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        steps.append(1)
        loss: torch.Tensor = plain(*args, **kwargs)  # type: ignore[arg-type]
        return loss * float("nan") if len(steps) == 3 else loss

    trainer.compute_loss = poisoned  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingDivergedError, match=r"step 3.*checkpoint-2"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_bases_that_are_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path)
    with pytest.raises(ValueError, match="needs the frozen base"):
        CacheConditionedTrainer(tiny.model(), arguments)
    with pytest.raises(ValueError, match="carries its base"):
        CacheConditionedTrainer(tiny.lora(), arguments, base=tiny.model())
    same = tiny.model()
    with pytest.raises(ValueError, match="second time"):
        CacheConditionedTrainer(same, arguments, base=same)


def test_the_contract_lies_in_every_checkpoint(tmp_path: Path) -> None:
    contract = Contract("base", None, "sha256:0", {}, {}, "last_token", "float32")
    trainer = CacheConditionedTrainer(
        tiny.lora(),
        tiny.arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=tiny.conversations(12),
        contract=contract,
    )
    trainer.train()
    assert (tmp_path / "checkpoint-3" / CONTRACT_NAME).is_file()
    assert Contract.load(tmp_path / "checkpoint-6") == contract


def test_reentrant_checkpointing_and_label_smoothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny.arguments(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
    with pytest.raises(ValueError, match="label_smoothing"):
        tiny.arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="neither"):
        tiny.arguments(tmp_path, method="sft")


def test_tensorboard_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = tiny.full_trainer(tmp_path, report_to=["tensorboard"], max_steps=2, **evaluated)
    trainer.train()
    (file,) = (tmp_path / "events").rglob("events.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(tiny.losses(trainer))
    for name in ("train/response_tokens_per_s", "train/base_token_share", "eval/perplexity"):
        assert events.Scalars(name)[0].value > 0


def test_wandb_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = tiny.full_trainer(tmp_path, report_to=["wandb"], max_steps=2)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/loss"] == pytest.approx(tiny.losses(trainer)[-1])
    assert summary["train/response_tokens_per_s"] > 0


def test_trackio_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    logged: list[dict[str, float]] = []
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setattr(trackio, "log", lambda values, **_: logged.append(values))
    trainer = tiny.full_trainer(tmp_path, report_to=["trackio"], max_steps=2)
    trainer.train()
    losses = [values["train/loss"] for values in logged if "train/loss" in values]
    assert losses == pytest.approx(tiny.losses(trainer))
    assert any("train/response_tokens_per_s" in values for values in logged)


def test_a_router_loss_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    decoder = families.build("qwen3_moe", torch.float32)
    base = families.build("qwen3_moe", torch.float32)
    decoder.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        CacheConditionedTrainer(decoder, tiny.arguments(tmp_path), base=base)
