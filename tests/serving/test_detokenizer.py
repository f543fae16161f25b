"""Text comes as it becomes certain, and is that of the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tests.data.helpers import tiny_tokenizer
from tests.serving.llama_tokenizer import SPECIAL, ids_of, llama_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers import models as models_of
from transformers import PreTrainedTokenizerFast

from prefillshare_train.serving.detokenizer import Detokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte tokens and a fallback decoder, as Llama 2, Mistral, Gemma and Phi-3 have."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581b": 256, "c": 257}
    backend = Tokenizer(models_of.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = byte_tokenizer()
LLAMA = llama_tokenizer()


def text_of(prompt: Sequence[int], response: Sequence[int]) -> str:
    stream = Detokenizer(LLAMA, (), prompt)
    return "".join(map(stream.push, response)) + stream.finish()


@pytest.mark.parametrize("text", ["héllo wörld", "日本語 🎉🎉 done", "plain", " leading", "\n\nx"])
def test_text_in_pieces_adds_up_to_the_whole(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer, ())
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab🎉", add_special_tokens=False)["input_ids"][:-1]
    stream = Detokenizer(tokenizer, ())
    assert "".join(stream.push(i) for i in ids) == "ab"
    assert stream.finish().startswith("\ufffd")


def test_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = tiny_tokenizer()
    stream = Detokenizer(tokenizer, ("END",))
    pieces = [stream.push(i) for i in tokenizer("xEyENz", add_special_tokens=False)["input_ids"]]
    assert pieces == ["x", "", "Ey", "", "", "ENz"]
    assert stream.stopped_by is None
    pieces = [stream.push(i) for i in tokenizer("END", add_special_tokens=False)["input_ids"]]
    assert pieces == ["", "", ""]
    assert stream.stopped_by == "END"


def test_bytes_that_are_no_text_do_not_end_a_response() -> None:
    chosen = random.Random(0)
    for _ in range(300):
        stream = Detokenizer(BYTES, ())
        ids = [chosen.choice([0xCE, 0xB2, 0xBF, 0xF0, 256, 257]) for _ in range(12)]
        text = "".join(stream.push(i) for i in [*ids, 257]) + stream.finish()
        assert text.endswith("c")
        assert text.count("c") == ids.count(257) + 1


def test_a_cut_off_character_after_byte_tokens_is_marked_once() -> None:
    stream = Detokenizer(BYTES, ())
    whole = [stream.push(byte) for byte in "\u6f22".encode()]
    assert "".join(whole) == "\u6f22"
    rest = "".join(stream.push(byte) for byte in "\U0001f389".encode()[:2]) + stream.finish()
    assert set(rest) == {"\ufffd"}
    assert len(rest) <= 2


PROMPT = ids_of("▁The", "▁is")
EURO = ids_of("<0xE2>", "<0x82>", "<0xAC>")


@pytest.mark.parametrize(
    "response",
    [
        ids_of("▁Paris", "▁is", "."),
        ids_of("Paris", "▁", "▁Paris"),
        ids_of("▁", "Paris"),
        ids_of("<0x20>", "Paris"),
        [*ids_of("▁"), *EURO, *EURO, *ids_of("▁is")],
        ids_of("</s>", "▁Paris"),
    ],
)
def test_a_response_continues_its_prompt(response: list[int]) -> None:
    for prompt in (PROMPT, ids_of("▁Paris", "</s>", "▁The"), ids_of("<s>", "▁"), 9 * EURO):
        whole = LLAMA.decode([*prompt, *response], skip_special_tokens=True)
        before = LLAMA.decode(prompt, skip_special_tokens=True)
        assert before + text_of(prompt, response) == whole


def test_behind_a_special_token_the_text_is_the_responses_own() -> None:
    """Templates such as Phi-3's end so; chat then says what `decode` says of the response."""
    response = ids_of("▁Paris", "▁is", "</s>")
    for prompt in ([], ids_of("<s>"), ids_of("▁The", "</s>", SPECIAL)):
        assert text_of(prompt, response) == "Paris is"


@pytest.mark.parametrize("count", [1, 2])
def test_a_character_that_the_prompt_begins_is_told_whole_and_once(count: int) -> None:
    for before in (PROMPT, [*PROMPT, *EURO, *EURO], 9 * EURO):
        prompt = [*before, *EURO[:count]]
        assert text_of(prompt, [*EURO[count:], *ids_of("▁is")]) == "€ is"
        assert text_of(prompt, [*EURO[count:], *EURO, *ids_of("▁is")]) == "€€ is"
        # It may never become one.
        assert text_of(prompt, ids_of("▁is")) == " is"
    assert text_of([*PROMPT, *ids_of("\ufffd")], ids_of("▁is")) == " is"


def test_spaces_outlive_bytes_that_are_no_text() -> None:
    response = [*EURO, *ids_of("<0xBF>", "Paris", "▁is", "<0xE2>", "▁The")]
    assert text_of(PROMPT, response) == "€\ufffdParis is\ufffd The"


def test_a_byte_level_character_that_the_prompt_begins_is_told_whole() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab🎉c", add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer, (), ids[:4])
    assert "".join(map(stream.push, ids[4:])) == "🎉c"
