"""One training run, from a recipe to a decoder in a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, set_seed

from prefillshare_train.core.contract import Contract, cache_config, weights_fingerprint
from prefillshare_train.core.decoder_set import twin_of
from prefillshare_train.core.families import check_supported, position_limit
from prefillshare_train.core.modules import causal_lm_of, load_causal_lm
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.data import PreparedData, build_dataset
from prefillshare_train.training.base_weights import whole_weights
from prefillshare_train.training.checkpoints import StopOnSignal
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.exact_match import ExactMatchCallback
from prefillshare_train.training.launch import refuse_lone_process
from prefillshare_train.training.quantized import check_quantization
from prefillshare_train.training.recipe import LoadedRecipe, Recipe, RecipeError
from prefillshare_train.training.trainer import CacheConditionedTrainer

DECODER_FOLDER = "decoder"


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        decoder: folder of the finished decoder, None when a signal stopped the run early.
        trainer: the trainer, with its model and log history.
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
    return build_dataset(
        recipe.local_data,
        tokenizer,
        base_dir=loaded.base_dir,
        end_token_ids=_generation_ends(recipe),
    )


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
        base_id=recipe.base.model,
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
    """

    loaded: LoadedRecipe
    trainer: CacheConditionedTrainer
    data: PreparedData
    stop: StopOnSignal
    checkpoint: str | None

    def train(self) -> RunResult:
        """Train to the end and leave the decoder in `<output_dir>/decoder`."""
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        if self.stop.stopped:
            return RunResult(None, self.trainer, self.data)
        if self.data.eval and not self._is_evaluated:
            self.trainer.evaluate()
        decoder = self.trainer.output_folder / DECODER_FOLDER
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
        RecipeError: the output directory already holds a run and `resume` is False.
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
    checkpoint = trainer.last_checkpoint() if resume else None
    return PreparedRun(loaded, trainer, data, stop, checkpoint)


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
    history = json.dumps(trainer.state.log_history, indent=1)
    (beside / "log_history.json").write_text(history + "\n")
    if place.exists():
        shutil.rmtree(place)
    beside.rename(place)
