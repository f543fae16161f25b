"""The demo: two decoders trained on one base's cache, then answering one prompt off one prefill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import LoadedDecoder, add_adapter, load_decoder
from prefillshare_train.data import PreparedData
from prefillshare_train.training.comparison import HeldOut, Score, score_table
from prefillshare_train.training.plots import plot_losses
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import (
    DECODER_FOLDER,
    prepare_data,
    run_training,
)

_TASKS = ("tool_calling", "math")
_ANSWER_TOKENS = 128
_BATCH = 20  # turns answered at once: each step reads all weights, however many answers it serves


class DemoStoppedError(Exception):
    """A SIGTERM came; what was trained is saved, and the same command goes on."""


@dataclass(frozen=True)
class _Trained:
    folder: Path
    data: PreparedData
    history: list[dict[str, Any]]


def run_demo(model: Path, out: Path, recipes: Path, *, rows: int, steps: int | None) -> str:
    """Train (or reuse) both decoders, compare, and share a prefill.

    Args:
        rows: held-out turns that base and decoder answer.
        steps: train this many steps in place of the recipes' own.

    Returns:
        The table and the two answers, as text. `comparison.json` and `loss.png` lie in `out`.

    Raises:
        DemoStoppedError: training was stopped by SIGTERM.
    """
    trained = {task: _train(task, model, out, recipes, steps) for task in _TASKS}
    tools = trained["tool_calling"]
    loaded = load_decoder(tools.folder, base=str(model))
    # The rows are rendered anew: with another template than in training they would measure nothing.
    loaded.contract.verify(prompt=tools.data.renderer.prompt_contract())
    comparison = _compare(loaded, tools.data, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(
        json.dumps([score.row() for score in comparison], indent=2) + "\n"
    )
    plot = plot_losses({task: run.history for task, run in trained.items()}, out / "loss.png")
    shared = _share_one_prefill(loaded, trained["math"].folder, tools.data)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(score_table(comparison, "Tool calls with tools unseen in training"))
        console.print(shared, markup=False, emoji=False, highlight=False)
    return f"{captured.get()}loss plot: {plot}"


def _train(task: str, model: Path, out: Path, recipes: Path, steps: int | None) -> _Trained:
    overrides = [f"base.model={model}", f"training.output_dir={out / task}"]
    if steps is not None:
        overrides.append(f"training.max_steps={steps}")
    loaded = load_recipe([recipes / f"{task}.yaml"], overrides)
    folder = out / task / DECODER_FOLDER
    if not folder.is_dir() and run_training(loaded, resume=True).decoder is None:
        raise DemoStoppedError
    data = prepare_data(loaded)
    return _Trained(folder, data, json.loads((folder / "log_history.json").read_text()))


def _compare(loaded: LoadedDecoder, data: PreparedData, rows: int) -> list[Score]:
    """Held-out loss and exact match of the base, and of the decoder on the base's cache."""
    held_out = HeldOut(data, data.eval_examples[:rows], _ANSWER_TOKENS, _BATCH)
    rule = loaded.contract.rule
    with loaded.prefill.base_weights():
        base = held_out.score("base", loaded.decoder, loaded.prefill, rule)
    return [
        base,
        held_out.score("decoder on the base's cache", loaded.decoder, loaded.prefill, rule),
    ]


def _share_one_prefill(loaded: LoadedDecoder, other: Path, data: PreparedData) -> str:
    """One prompt, one prefill, two decoders."""
    decoder = loaded.decoder
    assert isinstance(decoder, PeftModel)
    add_adapter(loaded, other, "math")
    example = data.eval_examples[0]
    prompt = list(example.prompt_ids)
    cut = loaded.contract.rule.base_length(len(prompt), example.header_length)
    cache = loaded.prefill.prefill([prompt[:cut]])
    lines = [
        f"one prefill: {cut} tokens, {cache.nbytes / 2**20:.1f} MiB of K/V, read by two decoders",
        f"request: {example.row.messages[0]['content']}",
    ]
    for adapter, name in (("default", "tool_calling"), ("math", "math")):
        decoder.set_adapter(adapter)
        answer = generate(
            decoder,
            cache,
            [prompt],
            max_new_tokens=_ANSWER_TOKENS,
            stop_ids=data.renderer.end_token_ids,
        )[0]
        text = data.renderer.decode(answer, skip_special_tokens=True)
        lines.append(f"{name} decoder: {text.strip()}")
    return "\n".join(lines)
