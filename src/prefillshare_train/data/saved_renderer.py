"""The renderer of a finished decoder, from its folder and its contract; and that of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from prefillshare_train.data.errors import DataError
from prefillshare_train.data.rendering import Renderer, make_renderer


def saved_renderer(folder: Path | str, prompt: dict[str, Any]) -> Renderer:
    """Make the prompts that a decoder was trained on.

    Args:
        folder: the decoder's folder; its tokenizer carries the template.
        prompt: the `prompt` part of the decoder's contract.

    Raises:
        DataError: the folder's tokenizer or template is not the one that the contract names.
    """
    renderer = make_renderer(
        AutoTokenizer.from_pretrained(str(folder)),
        system_prompt=prompt["system_prompt"],
        template_kwargs=prompt["template_kwargs"],
        end_token_ids=prompt["end_token_ids"],
    )
    here = renderer.prompt_contract()
    different = [
        f"{key} is {here.get(key)!r} there and {prompt.get(key)!r} in the contract"
        for key in sorted({*here, *prompt})
        if here.get(key) != prompt.get(key)
    ]
    if different:
        raise DataError(
            f"{folder}: its tokenizer files are not those that the decoder was trained with "
            f"({'; '.join(different)}). Restore tokenizer.json and chat_template.jinja"
        )
    return renderer


def base_renderer(
    base: str,
    revision: str | None,
    chat_template: str | None,
    *,
    prompt_template: str | None = None,
) -> Renderer:
    """The prompts of a base on its own.

    Args:
        base: hub id or folder; only its tokenizer and generation configuration are read.
        chat_template: a `.jinja` file or a packaged name; None takes the tokenizer's own.
        prompt_template: likewise, for a tokenizer that has none.

    Raises:
        DataError: there is no such template, or none at all.
        OSError: there is no tokenizer.
    """
    try:
        ends = GenerationConfig.from_pretrained(base, revision=revision or "main").eos_token_id
    except OSError:
        ends = None
    tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    has_template = bool(chat_template or tokenizer.chat_template)
    return make_renderer(
        tokenizer,
        chat_template=chat_template,
        prompt_template=None if has_template else prompt_template,
        end_token_ids=[ends] if isinstance(ends, int) else list(ends or []),
    )
