"""From messages to prompt text and token ids: the one place that decides what a prompt looks like.

Chat templates and prompt templates are both Jinja texts, so that whatever serves a decoder can be
given the very text that it was trained with (`Renderer.template`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from prefillshare_train.data.errors import DataError
from prefillshare_train.data.rows import Message, Tool
from prefillshare_train.data.template_files import load_template, packaged_templates

Kind = Literal["tokenizer", "chat_template", "prompt_template"]
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class RenderError(DataError):
    """A template refuses these messages."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with the template and the options that shape its prompts.

    Build it with `make_renderer`.

    Attributes:
        tokenizer: of the base model; never changed.
        kind: where the template comes from.
        name: the packaged name or the file's name; `default` for the tokenizer's own.
        template: Jinja text, or one text a name where the tokenizer has several.
        system_prompt: system message for conversations without one.
        template_kwargs: further arguments of the template.
        end_token_ids: tokens that end a response: EOS, those of the generation config, and the one
            with which the template closes an assistant turn. Generation must stop at any of them.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    name: str
    template: str | dict[str, str]
    system_prompt: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    end_token_ids: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether a user's message is the whole prompt, with nothing around it but a BOS."""
        try:
            text = self.text(_PROBE[:1], add_generation_prompt=True)
        except RenderError:
            return False
        return text.removeprefix(self.tokenizer.bos_token or "") == _PROBE[0]["content"]

    def with_system_prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, after the system prompt where there is one and they have none."""
        if self.system_prompt is None or (
            messages and messages[0]["role"] in ("system", "developer")
        ):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Render messages as they are, without adding the system prompt.

        Raises:
            RenderError: the template refuses them.
            DataError: the template is not valid Jinja.
        """
        # None lets a tokenizer that has several templates choose by whether there are tools.
        template = self.template if isinstance(self.template, str) else None
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the template {self.name} is not valid Jinja (line {error.lineno}: "
                f"{error.message}). Correct it"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RenderError(
                f"the template {self.name} refuses the messages ({type(error).__name__}: {error})"
            ) from error
        assert isinstance(text, str)
        return text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Adds no BOS: the template has written it."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> list[int]:
        """`text`, encoded."""
        text = self.text(messages, tools, add_generation_prompt=add_generation_prompt)
        return self.encode([text])[0]

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """The prompt of the next assistant turn, system prompt included, as it was trained."""
        return self.ids(self.with_system_prompt(messages), tools, add_generation_prompt=True)

    def header_length(self, bare: str, prompt: str, prompt_ids: Sequence[int]) -> int:
        """Tokens of the generation prompt at a prompt's end.

        Args:
            bare: the text without the generation prompt.
            prompt: the text with it (and with what a response is made to begin with).
            prompt_ids: `prompt`, encoded.

        Returns:
            The count; 0 where there is no generation prompt or it merges with what precedes.
        """
        if len(prompt) == len(bare) or not prompt.startswith(bare):
            return 0
        alone = self.encode([prompt[len(bare) :]])[0]
        ids = list(prompt_ids)
        if 0 < len(alone) <= len(ids) and ids[-len(alone) :] == alone:
            return len(alone)
        before = self.encode([bare])[0]
        return len(ids) - len(before) if ids[: len(before)] == before else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, spaces left as they are."""
        text = self.tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def saved_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that carries this template, for a decoder's folder.

        Whatever loads it there renders the prompts that the decoder was trained on.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.template
        return tokenizer

    def fingerprint(self) -> dict[str, Any]:
        """Everything that shapes a prompt, as plain JSON values.

        `kind` and `name` say where the template came from; equal prompts follow from the rest.
        """
        template = self.template
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return {
            "kind": self.kind,
            "name": self.name,
            "template_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "template_kwargs": dict(self.template_kwargs),
            "system_prompt": self.system_prompt,
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
            "end_token_ids": list(self.end_token_ids),
        }

    def prompt_contract(self) -> dict[str, Any]:
        """What shapes a prompt, as a decoder's contract keeps it.

        Where a template lies and what it is called shape nothing; its text does.
        """
        found = self.fingerprint()
        kept = {key: value for key, value in found.items() if key not in ("kind", "name")}
        plain: dict[str, Any] = json.loads(json.dumps(kept))
        return plain


def make_renderer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    end_token_ids: Sequence[int] = (),
    base_dir: Path = Path("."),
) -> Renderer:
    """Choose the template and find the tokens that end a response.

    Args:
        chat_template: a `.jinja` file or a packaged name; None takes the tokenizer's own.
        prompt_template: likewise, for checkpoints without a chat template.
        end_token_ids: the generation config's EOS ids, where it has others than the tokenizer.
        base_dir: where relative paths are looked up after the current directory.

    Raises:
        DataError: there is no such template, or none at all, or the tokenizer has no EOS to end a
            prompt template's responses with.
    """
    template: str | dict[str, str]
    if prompt_template is not None:
        kind: Kind = "prompt_template"
        name, template = load_template("prompt", prompt_template, base_dir)
        template = _with_bos(template, tokenizer)
        if tokenizer.eos_token is None:
            raise DataError(
                f"prompt_template {prompt_template}: the tokenizer has no EOS token to end a "
                "response with. Set eos_token in the tokenizer"
            )
    elif chat_template is not None:
        kind = "chat_template"
        name, template = load_template("chat", chat_template, base_dir)
    elif tokenizer.chat_template:
        kind, name, template = "tokenizer", "default", tokenizer.chat_template
        # Saved and loaded again, a dict of this one template comes back as its text.
        if isinstance(template, dict) and set(template) == {"default"}:
            template = template["default"]
    else:
        raise DataError(
            "the tokenizer has no chat template. Set data.prompt_template to one of "
            f"{', '.join(packaged_templates('prompt'))}, or data.chat_template to a .jinja file or "
            f"one of {', '.join(packaged_templates('chat'))}"
        )
    renderer = Renderer(tokenizer, kind, name, template, system_prompt, dict(template_kwargs or {}))
    ends = {*end_token_ids, *_closing_token(renderer)}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return Renderer(
        tokenizer,
        kind,
        name,
        template,
        system_prompt,
        renderer.template_kwargs,
        tuple(sorted(ends)),
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which ids a text gets.

    Padding and truncation settings are left out: calls change them in place, and trainers choose a
    pad token where there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    special.pop("pad_token", None)
    parts = [state, special]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _with_bos(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template with BOS before it where the tokenizer puts one before plain text."""
    bos = tokenizer.bos_token
    if bos is None or "bos_token" in template or bos in template:
        return template
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}\n" + template if starts_with_bos else template


def _closing_token(renderer: Renderer) -> Iterator[int]:
    """The special token with which the template closes an assistant turn, if any.

    Gemma closes with `<end_of_turn>` and Phi-3 with `<|end|>`, while their EOS is another token.
    """
    try:
        ids = renderer.ids(_PROBE, add_generation_prompt=False)
    except RenderError:
        return
    special = {
        token for token, added in renderer.tokenizer.added_tokens_decoder.items() if added.special
    }
    closing = None
    for token in reversed(ids):
        if token in special:
            closing = token
        elif renderer.decode([token]).strip():
            break
    if closing is not None:
        yield closing
