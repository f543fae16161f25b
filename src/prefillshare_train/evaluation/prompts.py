"""From a benchmark's items to prompt tokens, by the decoders' own template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefillshare_train.data import Renderer, tools_left_out
from prefillshare_train.evaluation.task import EvalItem, EvaluationError


@dataclass(frozen=True, slots=True)
class Prompt:
    """An item's prompt.

    Attributes:
        ids: token ids, generation prompt and response prefix included.
        header_length: tokens from the generation prompt on.
        sha256: of the ids as little-endian int64.
    """

    item: EvalItem
    ids: tuple[int, ...]
    header_length: int
    sha256: str

    @property
    def request_sha256(self) -> str:
        """Of everything that fixes a greedy answer, so that two tasks can share one."""
        parts = (self.sha256, *self.item.stop, str(self.item.max_new_tokens))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def render(
    items: Sequence[EvalItem], renderer: Renderer, position_count: int | None
) -> list[Prompt]:
    """Render and encode.

    Args:
        position_count: positions that the model was made for.

    Raises:
        EvaluationError: two items have one id, the template does not show an item's tools, or a
            prompt leaves no room for its answer.
    """
    prompts = []
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise EvaluationError(f"two items have the id {item.item_id}")
        seen.add(item.item_id)
        messages = renderer.with_system_prompt(item.messages)
        bare = renderer.text(messages, item.tools, add_generation_prompt=False)
        text = renderer.text(messages, item.tools, add_generation_prompt=True)
        if item.tools and (
            fault := tools_left_out(renderer, item.tools, messages, text, f"item {item.item_id}")
        ):
            raise EvaluationError(
                f"{fault}. Show them by --bfcl-style prompting, or, where no decoder brings its "
                "template, by --chat-template chatml-tools"
            )
        text += item.response_prefix
        ids = renderer.encode([text])[0]
        if position_count is not None and len(ids) + item.max_new_tokens > position_count:
            raise EvaluationError(
                f"item {item.item_id} has {len(ids)} prompt tokens and may take "
                f"{item.max_new_tokens} more; the model holds {position_count}. Lower "
                "--max-new-tokens, or leave the task out"
            )
        digest = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()
        header = renderer.header_length(bare, text, ids)
        prompts.append(Prompt(item, tuple(ids), header, digest))
    return prompts
