"""From lm-eval's texts to token ids and to the boundary, by a decoder's own template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from lm_eval.models.utils import has_bos_prefix

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.data import Message, Renderer
from prefillshare_train.evaluation.task import EvaluationError

_PROBE = ({"role": "user", "content": "a"},)


class DecoderPrompts:
    """What lm-eval asks of a model's tokenizer and template, answered as in training."""

    def __init__(self, renderer: Renderer, rule: BoundaryRule) -> None:
        self.renderer = renderer
        # It carries the template, which lm-eval reads off it.
        self.tokenizer = renderer.saved_tokenizer()
        self._rule = rule
        opening, bare = (
            renderer.text(renderer.with_system_prompt(_PROBE), add_generation_prompt=generation)
            for generation in (True, False)
        )
        self._header = opening[len(bare) :] if opening.startswith(bare) else ""
        bos = self.tokenizer.bos_token
        # A BOS that the tokenizer adds and the template does not write was never seen in training.
        self._never_adds = bos is not None and not opening.startswith(bos)

    @property
    def prefix_token_id(self) -> int:
        """Context of a continuation that has none: BOS, or EOS where there is no BOS."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id
        return eos if bos is None else bos

    @property
    def name(self) -> str:
        """Of all that shapes a prompt."""
        prompt = json.dumps(self.renderer.prompt_contract(), sort_keys=True)
        return f"prefillshare-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"

    def chat(self, history: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Text of the prompt after these messages.

        Args:
            add_generation_prompt: False where the last message is the beginning of the answer.

        Raises:
            RenderError: the template refuses the messages.
        """
        messages = self.renderer.with_system_prompt(history)
        if add_generation_prompt or messages[-1]["role"] != "assistant":
            return self.renderer.text(messages, add_generation_prompt=add_generation_prompt)
        prompt = self.renderer.text(messages[:-1], add_generation_prompt=True)
        beginning: str = messages[-1]["content"]
        return prompt + beginning

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; BOS is added as HFLM adds it, but never to a prompt trained without one."""
        if add_special_tokens is None:
            written = has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not (self._never_adds or written)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def base_length(self, text: str, ids: Sequence[int], kept: int) -> int:
        """Tokens that the base runs.

        Args:
            text: the whole prompt.
            ids: its token ids.
            kept: how many of them are left, at their end, where it was too long.

        Raises:
            EvaluationError: the boundary rule needs an assistant header and the text has none.
        """
        header = 0
        if self._rule.kind == "generation_prompt" and self._header and self._header in text:
            # The last header opens the answer; those of earlier turns are history.
            header = self.renderer.header_length(text[: text.rfind(self._header)], text, ids)
        try:
            return self._rule.base_length(kept, min(header, kept))
        except ValueError as error:
            raise EvaluationError(
                f"{error}. With lm-eval pass --apply_chat_template; the prompt ends in "
                f"{text[-80:]!r}"
            ) from error
