"""Prepared data as a person reads it: who runs which token, and what the data allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation
from prefillshare_train.data import PreparedData, Renderer
from prefillshare_train.training.recipe import Recipe

_STYLES = {"base": "blue", "decoder": "yellow", "trained": "bold green"}
_BARS = 30


def token_views(recipe: Recipe, data: PreparedData, rows: int, *, marks: bool) -> Iterator[Text]:
    """One text a turn of the first training conversations.

    Args:
        marks: write `[base]`, `[decoder]` and `[trained]` before each stretch, for plain text.
    """
    rule = BoundaryRule.parse(recipe.boundary)
    for number, conversation in enumerate(data.train[:rows], start=1):
        for turn in conversation.turns:
            start = (
                rule.base_length(turn.prompt_length, turn.header_length)
                if recipe.method == "prefillshare"
                else 0
            )
            ids, n = conversation.token_ids, turn.prompt_length
            text = Text(
                f"-- conversation {number}: base runs {start} tokens, decoder {n - start} of the "
                f"prompt, {turn.end - n} are trained\n"
            )
            for name, stretch in (
                ("base", ids[:start]),
                ("decoder", ids[start:n]),
                ("trained", ids[n : turn.end]),
            ):
                _append(text, name, stretch, data.renderer, marks)
            text.append("\n")
            yield text


def _append(text: Text, name: str, ids: Sequence[int], renderer: Renderer, marks: bool) -> None:
    if ids:
        text.append(f"[{name}]" if marks else "")
        text.append(renderer.decode(list(ids)), style=_STYLES[name])


def data_summary(recipe: Recipe, data: PreparedData) -> Iterator[str]:
    """The data report, length histograms and the FLOP ratio to plain fine-tuning."""
    yield str(data.report)
    turns = [turn for conversation in data.train for turn in conversation.turns]
    yield histogram("prompt tokens", [turn.prompt_length for turn in turns])
    yield histogram("response tokens", [turn.end - turn.prompt_length for turn in turns])
    ratio = flop_ratio(recipe, data.train)
    yield f"FLOPs of plain fine-tuning / of prefillshare on this data: {ratio:.2f}"


def histogram(title: str, values: Sequence[int], bins: int = 8) -> str:
    """A plain-text histogram with equal bins."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * bins
    for value in values:
        counts[(value - low) // width] += 1
    lines = [f"{title}:"]
    for i, count in enumerate(counts):
        first = low + i * width
        if first <= high:
            bar = "#" * round(_BARS * count / max(counts))
            lines.append(f"  {first:>6}-{min(first + width - 1, high):<6} {count:>6} {bar}")
    return "\n".join(lines)


def flop_ratio(recipe: Recipe, conversations: Sequence[Conversation]) -> float:
    """FLOPs of `full_prompt` over those of `prefillshare` for the same conversations."""
    import torch

    config = AutoConfig.from_pretrained(recipe.base_location, revision=recipe.base.revision)
    with torch.device("meta"):
        stack, head = matmul_parameters(AutoModelForCausalLM.from_config(config))
    rule = BoundaryRule.parse(recipe.boundary)
    names = ("activation_checkpointing", "gradient_checkpointing")  # the new name and the old
    checkpointing = any(recipe.training.get(name) for name in names)
    plain, shared = (
        step_flops(
            pack(conversations, rule, method)["layout"],
            stack=stack,
            head=head,
            config=config,
            trains_base_weights=recipe.decoder.adapter == "none",
            checkpointing=checkpointing,
        )
        for method in ("full_prompt", "prefillshare")
    )
    return plain / shared
