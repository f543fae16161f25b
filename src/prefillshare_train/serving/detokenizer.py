"""Text of a response while it is generated, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns tokens into text as it becomes certain.

    Characters of several tokens come when they are whole. Text that may be the beginning of a stop
    string is held back until it is known not to be.

    Args:
        stop: strings that end the response and are left out of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        # The Rust tokenizer decodes a token at a time; every family served here has one.
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self._pending: list[int] = []
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now. Sets `stopped_by` at a stop string."""
        self._pending.append(token)
        try:
            new = self._stream.step(self._backend, token)
        except Exception:  # bytes that are no UTF-8, for tokenizers with byte tokens
            new = self._decode_pending()
            self._stream = DecodeStream(skip_special_tokens=True)
        if new:
            self._pending = []
        self._held += new or ""
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
        text, self._held = self._held + self._decode_pending(), ""
        return text

    def _decode_pending(self) -> str:
        """Text of the tokens since text last came."""
        text: str = self._backend.decode(self._pending, skip_special_tokens=True)
        self._pending = []
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
