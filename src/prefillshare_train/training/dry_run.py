"""What a recipe would do, found out without touching any weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoConfig

from prefillshare_train.core.spans import Conversation
from prefillshare_train.training.estimate import (
    PARALLEL,
    estimate_memory,
    model_sizes,
    precision_line,
    step_memory,
    training_flops,
)
from prefillshare_train.training.recipe import LoadedRecipe, RecipeError, decoder_recipes
from prefillshare_train.training.run import prepare_data
from prefillshare_train.training.step_memory import StepMemory

_UTILISATION = 0.4  # of the peak; what well-tuned training reaches on GPUs


def dry_run_report(loaded: LoadedRecipe, ranks: int | None = None) -> str:
    """Check a recipe to its end short of weights, and say what it would train on and need.

    Of a recipe with `decoders`, each is reported as a run of its own.

    Args:
        ranks: GPUs of the parallel configurations; None for one GPU alone.

    Raises:
        RecipeError, DataError, UnsupportedModelError: what the run itself would raise.
    """
    recipe = loaded.recipe
    if recipe.decoders:
        reports = [
            f"== {name}\n{dry_run_report(one, ranks)}"
            for name, one in decoder_recipes(loaded).items()
        ]
        note = "trained together, LoRA decoders hold the base once and all read one prefill"
        return "\n\n".join([*reports, note])
    data = prepare_data(loaded)
    lines = [
        str(data.report),
        "",
        f"method {recipe.method}, boundary {recipe.boundary}, adapter {recipe.decoder.adapter}",
        *estimate_lines(loaded, data.train, ranks),
        "dry run ok",
    ]
    return "\n".join(lines)


def estimate_lines(
    loaded: LoadedRecipe, rows: Sequence[Conversation], ranks: int | None
) -> list[str]:
    """The estimate of memory and time, as a table.

    Args:
        rows: training conversations; the micro-batch of the longest decides.
        ranks: see `dry_run_report`.

    Raises:
        RecipeError: `decoder.lora` names something that PEFT does not know.
    """
    recipe = loaded.recipe
    arguments = recipe.training_arguments()
    config = AutoConfig.from_pretrained(recipe.base_location, revision=recipe.base.revision)
    batch = arguments.per_device_train_batch_size
    longest = sorted(rows, key=lambda c: len(c.token_ids))[-batch:]
    try:
        sizes = model_sizes(recipe, config)
    except TypeError as error:
        raise RecipeError(f"decoder.lora: {error}") from error
    # Without an accelerator the run would be on the CPU, whose attention keeps more.
    gpu = torch.accelerator.is_available() or ranks is not None
    names = PARALLEL if ranks is not None else ("one_gpu",)

    def simulated(parallel: str) -> StepMemory:
        return step_memory(recipe, arguments, config, longest, accelerator=gpu, parallel=parallel)

    whole = simulated("one_gpu")
    in_half = simulated("zero2") if ranks is not None else whole
    columns = [
        estimate_memory(
            recipe,
            arguments,
            sizes,
            whole if name in ("one_gpu", "ddp") else in_half,
            parallel=name,
            ranks=1 if name == "one_gpu" else ranks or 1,
        )
        for name in names
    ]
    where = f"each of {ranks} GPUs" if ranks is not None else "GPU" if gpu else "CPU"
    lines = [
        f"memory in MiB on {where}, {batch} of the longest conversations a micro-batch:",
        "  " + " " * 22 + "".join(f"{name:>14}" for name in names if ranks is not None),
    ]
    for key in columns[0]:
        values = "".join(f"{column[key] / 2**20:>14,.0f}" for column in columns)
        lines.append(f"  {key:<22}{values}")
    together = "".join(f"{sum(column.values()) / 2**20:>14,.0f}" for column in columns)
    lines.append(f"  {'together':<22}{together}")
    return [
        *(line for line in lines if line.strip()),
        precision_line(recipe),
        _time(loaded, config, rows, ranks),
    ]


def _time(loaded: LoadedRecipe, config: object, rows: Sequence[Conversation], ranks: object) -> str:
    recipe, arguments = loaded.recipe, loaded.recipe.training_arguments()
    flops = training_flops(recipe, arguments, config, rows)  # type: ignore[arg-type]
    text = f"an epoch is {flops:.3g} FLOPs"
    if arguments.peak_tflops is None:
        return f"{text}; set training.peak_tflops for its time"
    devices = ranks if isinstance(ranks, int) else 1
    hours = flops / (arguments.peak_tflops * 1e12 * _UTILISATION * devices) / 3600
    return f"{text}, {hours:.2g} h at {_UTILISATION:.0%} of {arguments.peak_tflops} TFLOP/s"
