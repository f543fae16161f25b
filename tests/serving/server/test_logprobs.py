"""Texts and bytes of single tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tests.serving.llama_tokenizer import SPECIAL, ids_of, llama_tokenizer
from tests.serving.server.fake_engine import renderer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefillshare_train.data import make_renderer
from prefillshare_train.serving.api import TokenLogprob
from prefillshare_train.serving.detokenizer import Detokenizer
from prefillshare_train.serving.server.logprobs import (
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
)

MODEL = Path(__file__).resolve().parents[3] / ".cache" / "models" / "smollm2-135m-instruct"
TEXT = "naïve 日本 🙂\n<|im_end|>"


def test_the_bytes_of_parts_of_characters_are_the_true_ones() -> None:
    used = renderer()
    texts = TokenTexts(used)
    ids = used.encode([TEXT])[0]
    assert b"".join(texts.of(token)[1] for token in ids) == TEXT.encode()
    assert "�" in {texts.of(token)[0] for token in ids}


def test_so_they_are_where_bytes_are_tokens_by_name() -> None:
    """As in Llama 2's and Gemma's vocabularies."""
    names = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    used = replace(renderer(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = used.encode(["a日"])[0]
    assert len(ids) == 4
    assert b"".join(TokenTexts(used).of(token)[1] for token in ids) == "a日".encode()


@pytest.mark.real_model
def test_so_they_are_for_a_real_tokenizer() -> None:
    if not (MODEL / "tokenizer.json").is_file():
        pytest.skip(f"the model folder {MODEL} is absent; run `make model`")
    used = make_renderer(AutoTokenizer.from_pretrained(MODEL))
    texts = TokenTexts(used)
    assert b"".join(texts.of(token)[1] for token in used.encode([TEXT])[0]) == TEXT.encode()


def test_json_has_no_infinity() -> None:
    texts = TokenTexts(renderer())
    entry = TokenLogprob(70, -math.inf, ((70, -math.inf), (71, -0.1)))
    chat = chat_logprobs([entry], texts)
    assert chat.content[0].logprob == -9999.0
    assert [top.logprob for top in chat.content[0].top_logprobs] == [-9999.0, -0.1]
    assert completion_logprobs([entry], texts, 0).token_logprobs == [-9999.0]


def test_plain_completions_report_the_chosen_token_among_the_likely() -> None:
    used = renderer()
    a, b, c = used.encode(["abc"])[0]
    entries = [TokenLogprob(a, -3.0, ((b, -0.1), (c, -0.2))), TokenLogprob(b, -1.0)]
    found = completion_logprobs(entries, TokenTexts(used), 5)
    assert found.top_logprobs == [{"b": -0.1, "c": -0.2, "a": -3.0}, {"b": -1.0}]
    assert found.tokens == ["a", "b"]
    assert found.text_offset == [5, 6]


def test_words_keep_the_space_that_a_texts_first_word_loses() -> None:
    used = replace(renderer(), tokenizer=llama_tokenizer())
    texts = TokenTexts(used)
    ids = ids_of("▁Paris", "<0x20>", "Paris", "▁", "<0xC3>", "<0xA9>", "▁is", "<0x0A>", "Paris")
    stream = Detokenizer(used.tokenizer, (), ids_of("▁The", "▁is"))
    text = "".join(map(stream.push, ids))
    assert text == " Paris Paris é is\nParis"
    assert b"".join(texts.of(token)[1] for token in ids) == text.encode()
    assert texts.of(ids_of(SPECIAL)[0]) == (SPECIAL, SPECIAL.encode())
    spaced, bare, other = ids_of("▁Paris", "Paris", "▁is")
    entries = [TokenLogprob(spaced, -0.5, ((bare, -1.5),)), TokenLogprob(other, -0.1)]
    found = completion_logprobs(entries, texts, 3)
    assert found.tokens == [" Paris", " is"]
    assert found.top_logprobs == [{" Paris": -0.5, "Paris": -1.5}, {" is": -0.1}]
    assert found.text_offset == [3, 9]
