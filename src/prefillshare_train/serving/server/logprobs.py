"""Log-probabilities in the forms of chat and of plain completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefillshare_train.data import Renderer
from prefillshare_train.serving.api import TokenLogprob
from prefillshare_train.serving.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    TopLogprob,
)

_LEAST = -9999.0
"""JSON has no infinity; OpenAI's servers write this instead."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED_TOKENS = 1 << 16


class TokenTexts:
    """Text and bytes of single tokens.

    A token may be a part of a character; its text is then the replacement character, and its
    bytes are the true ones where the tokenizer tells them. An ordinary token has the text that it
    has behind a word: Llama 2's tokenizer and others drop the space of one that is decoded alone.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._bytes_of_letters = _letters() if _is_byte_level(renderer.tokenizer) else None
        self._special = set(renderer.tokenizer.all_special_ids)
        self._word = renderer.encode(["a"])[0]
        self._word_text = renderer.decode(self._word)
        self.of = lru_cache(_CACHED_TOKENS)(self._of)
        """Text and bytes of a token id."""

    def _of(self, token_id: int) -> tuple[str, bytes]:
        if token_id in self._special:
            text = self._renderer.decode([token_id])
            return text, text.encode()
        text = self._renderer.decode([*self._word, token_id]).removeprefix(self._word_text)
        token = self._renderer.tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, str):
            byte = _BYTE_TOKEN.fullmatch(token)
            if byte:
                return text, bytes.fromhex(byte[1])
            letters = self._bytes_of_letters
            if letters is not None and all(letter in letters for letter in token):
                return text, bytes(letters[letter] for letter in token)
        return text, text.encode()


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> ChatLogprobs:
    """The form of chat completions."""
    return ChatLogprobs(
        content=[
            ContentLogprob(
                top_logprobs=[_top(token_id, value, texts) for token_id, value in entry.top],
                **_top(entry.token_id, entry.logprob, texts).model_dump(),
            )
            for entry in entries
        ]
    )


def completion_logprobs(
    entries: Sequence[TokenLogprob], texts: TokenTexts, offset: int
) -> CompletionLogprobs:
    """The form of plain completions; `offset` is that of the first token's text."""
    tokens = [texts.of(entry.token_id)[0] for entry in entries]
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        top_logprobs=[_by_text(entry, texts) for entry in entries],
        text_offset=list(_offsets(tokens, offset)),
    )


def _top(token_id: int, logprob: float, texts: TokenTexts) -> TopLogprob:
    text, raw = texts.of(token_id)
    return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(raw))


def _by_text(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        # Two tokens may have one text; the likelier is told.
        text = texts.of(token_id)[0]
        found[text] = max(_finite(logprob), found.get(text, _LEAST))
    return found


def _offsets(tokens: Sequence[str], offset: int) -> Iterator[int]:
    for token in tokens:
        yield offset
        offset += len(token)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", [])))


def _letters() -> dict[str, int]:
    """The byte of each letter in which GPT-2's byte-level vocabularies are written."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
