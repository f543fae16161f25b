"""Text of a response while it is generated, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_PARTIAL = "\ufffd"
"""What the tokenizer decodes a part of a character to."""
_CHARACTER_BYTES = 4
_CONTEXT_TOKENS = range(6, 25)


class Detokenizer:
    """Turns tokens into text as it becomes certain.

    Characters of several tokens come when they are whole. Text that may be the beginning of a stop
    string is held back until it is known not to be.

    Tokenizers such as Llama 2's take a space from the beginning of what they decode, so tokens are
    decoded behind the end of what precedes them. Special tokens have no text, and nothing before
    the prompt's last one counts: after a chat template that ends in one, the text is that of the
    response decoded alone.

    Args:
        stop: strings that end the response and are left out of its text.
        prompt_ids: what the response follows. The text begins with a character that the prompt
            leaves unfinished.
    """

    # `tokenizers.decoders.DecodeStream` would repeat the prompt's text where the prompt ends within
    # a character, and fails on bytes that are no UTF-8.

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        # The Rust tokenizer decodes fast; every family served here has one.
        self._backend = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._held = ""
        self._ids = self._end_of(prompt_ids)
        self._follow()
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now. Sets `stopped_by` at a stop string."""
        self._ids.append(token)
        text = self._decode(self._ids)
        new = "" if text.endswith(_PARTIAL) else self._behind_told(text)
        if new:
            if not self._told.endswith(_PARTIAL):  # else the new ids may begin within a character
                del self._ids[: self._told_ids]
            self._follow()
        self._held += new
        found = [(at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """What was held back, once no token follows; an unfinished character becomes U+FFFD."""
        text, self._held = self._held + self._behind_told(self._decode(self._ids)), ""
        self._follow()
        return text

    def _follow(self) -> None:
        """Let all ids so far be the context of those to come."""
        self._told = self._decode(self._ids)
        self._told_ids = len(self._ids)

    def _behind_told(self, text: str) -> str:
        """What of the text of all ids has not been told."""
        if text.startswith(self._told):
            return text[len(self._told) :]
        whole = self._whole_text(self._ids[: self._told_ids])
        if text.startswith(whole):
            return text[len(whole) :]
        # One byte that does not fit turns a whole run of byte tokens into U+FFFD, those told too.
        return self._decode(self._ids[self._told_ids :])

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """A few of the prompt's last tokens: none before a special one, nor half a character."""
        kept: list[int] = []
        for token in reversed(prompt_ids[-_CONTEXT_TOKENS[-1] :]):
            if self._is_special(token):
                break
            kept.insert(0, token)
            if len(kept) in _CONTEXT_TOKENS and not self._whole_text(kept).startswith(_PARTIAL):
                break
        return kept

    def _whole_text(self, ids: Sequence[int]) -> str:
        """Their text without the character that they leave unfinished."""
        texts = (self._decode(ids[: len(ids) - count]) for count in range(_CHARACTER_BYTES))
        return next((text for text in texts if not text.endswith(_PARTIAL)), self._decode(ids))

    def _is_special(self, token: int) -> bool:
        shown: str = self._backend.decode([token], skip_special_tokens=False)
        return shown != self._decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
