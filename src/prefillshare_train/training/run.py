"""One training run, from a recipe to a decoder in a folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, set_seed

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, cache_config, weights_fingerprint
from prefillshare_train.core.decoder_set import twin_of
from prefillshare_train.core.families import check_supported, position_limit
from prefillshare_train.core.modules import causal_lm_of, load_causal_lm
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.data import PreparedData, build_dataset, require_headers
from prefillshare_train.training.base_weights import whole_weights
from prefillshare_train.training.checkpoints import (
    StopOnSignal,
    check_arguments,
    differences,
    replace_folder,
)
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.exact_match import ExactMatchCallback
from prefillshare_train.training.launch import refuse_lone_process
from prefillshare_train.training.quantized import check_quantization
from prefillshare_train.training.recipe import LoadedRecipe, Recipe, RecipeError
from prefillshare_train.training.trainer import CacheConditionedTrainer

DECODER_FOLDER = "decoder"
_PLACES = ("training.output_dir", "local_copies.")
"""Keys of a recipe that say where, and change no decoder."""


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        decoder: folder of the finished decoder, None when a signal stopped the run early.
        trainer: the trainer, with its model and log history. Where an earlier start had finished
            the decoder, the model is as it was before training: load the decoder from its folder.
        data: the prepared data.
    """

    decoder: Path | None
    trainer: CacheConditionedTrainer
    data: PreparedData


def prepare_data(loaded: LoadedRecipe) -> PreparedData:
    """Everything before weights: configuration, tokenizer, template and data are checked here."""
    recipe = loaded.recipe
    config = AutoConfig.from_pretrained(recipe.base_location, revision=recipe.base.revision)
    check_supported(config)
    check_quantization(recipe, config)
    limit = position_limit(config)
    if limit is not None and recipe.data.max_length > limit:
        raise RecipeError(
            f"data.max_length is {recipe.data.max_length}, but this model's RoPE depends on the "
            f"batch's length past {limit}: set it to {limit} or less"
        )
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_location, revision=recipe.base.revision)
    data = build_dataset(
        recipe.local_data,
        tokenizer,
        base_dir=loaded.base_dir,
        end_token_ids=_generation_ends(recipe),
    )
    rule = BoundaryRule.parse(recipe.boundary)
    if recipe.method == "prefillshare" and rule.kind == "generation_prompt":
        require_headers([*data.train, *data.eval], data.renderer)
    return data


def _generation_ends(recipe: Recipe) -> list[int]:
    try:
        ends = GenerationConfig.from_pretrained(
            recipe.base_location, revision=recipe.base.revision or "main"
        ).eos_token_id
    except OSError:
        return []
    return [ends] if isinstance(ends, int) else list(ends or [])


@dataclass(frozen=True)
class SharedBase:
    """A base over which several decoders are trained in one process."""

    prefill: SharedPrefill
    fingerprint: str


def build_models(
    recipe: Recipe, arguments: CacheConditionedConfig, shared: SharedBase | None = None
) -> tuple[nn.Module, nn.Module | None, str]:
    """Load the decoder, the base where it is a second model, and fingerprint the base.

    With `shared`, that base's weights and fingerprint are taken, and no base is returned.

    Only a decoder that is trained in full beside its base may be partitioned as it is loaded; all
    else is loaded whole on every rank, and sharded where the run shards.

    Returns:
        decoder, base (None for LoRA and for `full_prompt`), and the base's fingerprint.
    """
    name, revision = recipe.base_location, recipe.base.revision
    base_dtype = getattr(torch, recipe.base.dtype)
    if recipe.decoder.adapter == "lora":
        if shared is not None:
            model, fingerprint = twin_of(shared.prefill.causal_lm), shared.fingerprint
        else:
            with whole_weights(arguments):
                model = load_causal_lm(name, dtype=base_dtype, revision=revision)
            fingerprint = weights_fingerprint(model)
        try:
            settings = LoraConfig(task_type="CAUSAL_LM", **recipe.decoder.lora)
        except TypeError as error:
            raise RecipeError(f"decoder.lora: {error}") from error
        return get_peft_model(model, settings), None, fingerprint
    decoder_dtype = getattr(torch, recipe.decoder.dtype)
    if recipe.method == "full_prompt":
        with whole_weights(arguments):
            decoder = load_causal_lm(name, dtype=decoder_dtype, revision=revision)
        return decoder, None, weights_fingerprint(decoder)
    if shared is not None:
        decoder = load_causal_lm(name, dtype=decoder_dtype, revision=revision)
        return decoder, None, shared.fingerprint
    with whole_weights(arguments):
        base = load_causal_lm(name, dtype=base_dtype, revision=revision)
    fingerprint = weights_fingerprint(base)
    return load_causal_lm(name, dtype=decoder_dtype, revision=revision), base, fingerprint


def make_contract(recipe: Recipe, model: nn.Module, data: PreparedData, base: str) -> Contract:
    """The contract of a decoder about to be trained; `base` is the base's fingerprint."""
    return Contract(
        base_id=recipe.base_name,
        base_revision=recipe.base.revision,
        base_fingerprint=base,
        cache_config=cache_config(causal_lm_of(model).config),
        prompt=data.renderer.prompt_contract(),
        boundary=recipe.boundary,
        kv_dtype=recipe.base.dtype,
        method=recipe.method,
        adapter=recipe.decoder.adapter,
    )


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to train.

    Attributes:
        loaded: its recipe.
        trainer: with model and data.
        data: the prepared data.
        stop: set `stop.stopped` to have the run save and end after its step.
        checkpoint: where it goes on from, or None.
        finished: whether the run's folder holds the decoder of this very recipe already.
    """

    loaded: LoadedRecipe
    trainer: CacheConditionedTrainer
    data: PreparedData
    stop: StopOnSignal
    checkpoint: str | None
    finished: bool = False

    def train(self) -> RunResult:
        """Train to the end and leave the decoder in `<output_dir>/decoder`."""
        decoder = self.trainer.output_folder / DECODER_FOLDER
        if self.finished:
            self.trainer.state.log_history = _log_history(decoder)
            self.trainer.state.global_step = _last_step(decoder)
            return RunResult(decoder, self.trainer, self.data)
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        state = self.trainer.state
        # A signal after the last step finds nothing to stop, and may have reached one rank only.
        if self.stop.stopped and state.global_step < state.max_steps:
            return RunResult(None, self.trainer, self.data)
        if self.data.eval and not self._is_evaluated:
            self.trainer.evaluate()
        publish_decoder(self.trainer, decoder, self.loaded.to_yaml())
        return RunResult(decoder, self.trainer, self.data)

    @property
    def _is_evaluated(self) -> bool:
        """Whether the log has the figures of the weights that are published."""
        state = self.trainer.state
        if self.trainer.args.load_best_model_at_end:  # they may be of an earlier step
            return False
        return any(
            "eval_loss" in entry and entry["step"] == state.global_step
            for entry in state.log_history
        )


def prepare_run(
    loaded: LoadedRecipe, *, resume: bool = False, shared: SharedBase | None = None
) -> PreparedRun:
    """Everything before the first step.

    Args:
        resume: go on from the newest complete checkpoint, if there is one.
        shared: a base that other runs of this process read too.

    Raises:
        RecipeError: the output directory already holds a run and `resume` is False, or one that was
            trained over another cache or with other arguments than the recipe's, or the decoder of
            another recipe without a checkpoint to go on from.
    """
    recipe = loaded.recipe
    arguments = recipe.training_arguments()
    output = Path(recipe.training["output_dir"])
    held = sorted(output.glob("checkpoint-*")) or sorted(output.glob(DECODER_FOLDER))
    if held and not resume:
        raise RecipeError(
            f"{output} already holds {held[-1].name}; add --resume to go on, or name another "
            "training.output_dir"
        )
    data = prepare_data(loaded)
    set_seed(arguments.seed)  # adapters begin at random weights, which every rank must share
    model, base, fingerprint = build_models(recipe, arguments, shared)
    stop = StopOnSignal()
    trainer = CacheConditionedTrainer(
        model,
        arguments,
        base=base,
        prefill=shared.prefill if shared is not None else None,
        train_dataset=data.train,
        eval_dataset=data.eval or None,
        contract=make_contract(recipe, model, data, fingerprint),
        processing_class=data.renderer.saved_tokenizer(),
        callbacks=[stop],
    )
    trainer.add_callback(ExactMatchCallback(trainer, data.eval_examples, data.renderer))
    checkpoint, decoder = trainer.last_checkpoint(), output / DECODER_FOLDER
    began = Path(checkpoint) if checkpoint is not None else decoder
    if not began.is_dir():
        return PreparedRun(loaded, trainer, data, stop, None)
    assert trainer.contract is not None
    _check_contract(began, trainer.contract)
    check_arguments(began, arguments)
    changes = _changes(decoder, loaded, trainer) if decoder.is_dir() else None
    if changes and checkpoint is None:
        raise RecipeError(
            f"{decoder} was trained by another recipe, and there is no checkpoint to go on from:\n"
            + "\n".join(changes)
            + "\nSet those keys to what they were, or train anew in another training.output_dir"
        )
    return PreparedRun(loaded, trainer, data, stop, checkpoint, finished=changes == [])


def _changes(decoder: Path, loaded: LoadedRecipe, trainer: CacheConditionedTrainer) -> list[str]:
    """What tells a finished decoder from the one that the recipe would leave."""
    began = _flat(yaml.safe_load((decoder / "recipe.yaml").read_text()))
    now = _flat(yaml.safe_load(loaded.to_yaml()))
    # The data may have grown, and the steps of an epoch with it.
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return differences({**began, "steps": _last_step(decoder)}, {**now, "steps": steps})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by their keys as overrides write them, without those of places."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return {key: value for key, value in found.items() if not key.startswith(_PLACES)}


def _log_history(decoder: Path) -> list[dict[str, Any]]:
    file = decoder / "log_history.json"
    history: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return history


def _last_step(decoder: Path) -> int:
    return max((entry["step"] for entry in _log_history(decoder)), default=0)


def _check_contract(began_at: Path, contract: Contract) -> None:
    """Refuse a folder that began over another cache: its decoder's contract would be untrue."""
    # The fingerprint tells bases apart; their names may differ between machines.
    began, now = (
        dataclasses.asdict(dataclasses.replace(c, base_id="", base_revision=None, version=0))
        for c in (Contract.load(began_at), contract)
    )
    if different := differences(began, now):
        raise RecipeError(
            f"{began_at} was trained with another contract than the recipe gives here:\n"
            + "\n".join(different)
            + "\nSet those keys to what they were, or train anew in another training.output_dir"
        )


def run_training(loaded: LoadedRecipe, *, resume: bool = False) -> RunResult:
    """Train a recipe to its end and leave the decoder in `<output_dir>/decoder`.

    Args:
        resume: go on from the newest complete checkpoint, if there is one.

    Raises:
        RecipeError: the output directory already holds a run and `resume` is False, or the recipe
            names several decoders.
        LaunchError: this process was meant to be one of several.
    """
    refuse_lone_process()
    if loaded.recipe.decoders:
        raise RecipeError("the recipe names several decoders: use `train_decoders`")
    return prepare_run(loaded, resume=resume).train()


def publish_decoder(trainer: CacheConditionedTrainer, place: Path, recipe_yaml: str) -> None:
    """Save the decoder, its contract, recipe and log beside its place, then rename it there."""
    beside = place.with_name(f".unfinished-{place.name}")
    if trainer.args.should_save:
        shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside))
    if not trainer.args.should_save:
        return
    (beside / "recipe.yaml").write_text(recipe_yaml)
    history = list(trainer.state.log_history)
    if not trainer.has_trained:  # what the training took is told by the log of the start that did
        told = [entry for entry in _log_history(place) if "train_runtime" in entry]
        history += [entry for entry in told if entry["step"] == trainer.state.global_step]
    (beside / "log_history.json").write_text(json.dumps(history, indent=1) + "\n")
    replace_folder(beside, place)
