"""A decoder used like a transformers model: the same tokens where both can answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import decoders
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

import prefillshare_train
from prefillshare_train.core.contract import Contract, ContractError, weights_fingerprint
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.model import PrefillShareModel

PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [60, 61, 62], [100]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return decoders.save_decoder(base.parent / "lora", base, lora={})


@pytest.fixture(scope="module")
def unchanged(base: Path) -> Path:
    """A LoRA decoder that computes what its base computes."""
    return decoders.save_decoder(base.parent / "same", base, lora={"lora_alpha": 1e-12})


def padded(prompts: list[list[int]], pad: int = 2) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 9},
        {"max_length": 12},
        {"max_new_tokens": 9, "eos_token_id": None},
        {"max_new_tokens": 8, "do_sample": True},
        {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 30},
        {"max_new_tokens": 8, "do_sample": True, "min_p": 0.01, "top_k": 0},
        {"max_new_tokens": 9, "repetition_penalty": 3.0},
        {"max_new_tokens": 9, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 6, "min_new_tokens": 4, "do_sample": True, "temperature": 9.0},
        {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=True, top_k=5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
def test_over_an_equal_base_tokens_are_those_of_transformers(
    base: Path, unchanged: Path, options: dict[str, Any], prompts: list[list[int]]
) -> None:
    model = PrefillShareModel.from_pretrained(unchanged)
    plain = AutoModelForCausalLM.from_pretrained(base)
    if len(prompts) > 1:
        if "no_repeat_ngram_size" in options:
            pytest.skip("transformers counts a row's padding among what must not repeat")
        # Ended rows leave our batch, so that the draws of those that go on would differ.
        options = {"eos_token_id": 1, **options}
    inputs = padded(prompts)
    torch.manual_seed(7)
    found = model.generate(**inputs, **options)
    torch.manual_seed(7)
    expected = plain.generate(**inputs, pad_token_id=2, **options)
    assert found.tolist() == expected.tolist()
    assert found.dtype == torch.int64


def test_each_row_of_a_batch_equals_its_solo_answer_and_is_right_padded(lora: Path) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    solo = [model.generate(torch.tensor([p]), max_new_tokens=12)[0, len(p) :] for p in PROMPTS]
    ends = solo[1][3].item()  # ends some rows early, and others not
    inputs = padded(PROMPTS)
    together = model.generate(**inputs, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(together[:, :7], inputs["input_ids"])
    for row, alone in zip(together[:, 7:].tolist(), solo, strict=True):
        answer = alone.tolist()
        cut = answer[: answer.index(ends) + 1] if ends in answer else answer
        assert row == cut + [0] * (len(row) - len(cut))
    penalised = {"max_new_tokens": 8, "repetition_penalty": 5.0, "eos_token_id": None}
    together = model.generate(**inputs, **penalised)[:, 7:]
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = model.generate(torch.tensor([prompt]), **penalised)[0, len(prompt) :]
        assert torch.equal(row, alone)


def test_the_decoder_reads_the_bases_cache_up_to_its_boundary(base: Path, lora: Path) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    prompt = PROMPTS[0]
    loaded = load_decoder(lora)
    cache = loaded.prefill.prefill([prompt[:-1]])
    (expected,) = generate(loaded.decoder, cache, [prompt], max_new_tokens=8, stop_ids=())
    found = model.generate(torch.tensor([prompt]), max_new_tokens=8, eos_token_id=[])
    assert found[0, len(prompt) :].tolist() == expected


def test_another_dtype_than_the_contracts_is_told(
    lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Contract.load(lora).kv_dtype
    load_decoder(lora, dtype=getattr(torch, asked))
    assert "K/V" not in caplog.text
    load_decoder(lora, dtype=torch.float64)
    assert f"trained on K/V in {asked}" in caplog.text


def test_a_decoder_that_read_its_own_prompts_in_training_reads_them_here(base: Path) -> None:
    folder = decoders.save_decoder(base.parent / "own", base, method="full_prompt")
    found = PrefillShareModel.from_pretrained(folder).generate(torch.tensor(PROMPTS[:1]))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(found, plain.generate(torch.tensor(PROMPTS[:1])))


def test_the_header_is_found_in_token_ids(base: Path) -> None:
    folder = decoders.save_decoder(
        base.parent / "header", base, lora={}, boundary="generation_prompt"
    )
    model = PrefillShareModel.from_pretrained(folder)
    header = model.renderer.encode(["<|im_start|>assistant\n"])[0]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = model.renderer.prompt_ids(messages)
    assert prompt[-len(header) :] == header
    assert model._prefill([prompt, [*prompt, 70]]).lengths == (len(prompt) - len(header),) * 2
    with pytest.raises(ValueError, match="assistant header"):
        model.generate(torch.tensor([[70, 71]]))
    answer = model.chat(messages, max_new_tokens=5)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :]
    assert answer == model.renderer.decode(ids.tolist(), skip_special_tokens=True)


def test_tokens_are_streamed_as_they_come(lora: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.given: list[list[Any]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.given.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    model, streamer = PrefillShareModel.from_pretrained(lora), Kept()
    ids = torch.tensor([PROMPTS[1]])
    found = model.generate(ids, streamer=streamer, max_new_tokens=5)
    assert streamer.given[0] == [PROMPTS[1]]
    assert [token for (token,) in streamer.given[1:]] == found[0, 3:].tolist()
    assert streamer.ended
    with pytest.raises(HubError, match="3 asked for"):
        model.generate(**padded(PROMPTS), streamer=streamer)


def test_several_answers_share_one_prefill(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    prefilled: list[Any] = []
    plain = model.loaded.prefill.prefill
    monkeypatch.setattr(
        model.loaded.prefill, "prefill", lambda p: (prefilled.append(p), plain(p))[1]
    )
    found = model.generate(
        **padded(PROMPTS), num_return_sequences=3, do_sample=True, temperature=5.0, max_new_tokens=6
    )
    assert [len(p) for p in prefilled[0]] == [6, 2, 0]
    assert len(prefilled) == 1
    assert found.shape[0] == 9
    assert found[:3, :7].tolist() == found[:1, :7].tolist() * 3
    assert len({tuple(row) for row in found[:3].tolist()}) > 1
    seeded = [
        model.generate(
            torch.tensor(PROMPTS[:1]),
            do_sample=True,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    ]
    assert torch.equal(*seeded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"temprature": 1.0}, "takes no temprature"),
        ({"stop_strings": "x"}, "stop_strings='x'"),
        ({"max_length": 3}, "max_length is 3"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "padded on the left"),
        ({"attention_mask": torch.zeros(1, 7)}, "no token"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    lora: Path, arguments: dict[str, Any], message: str
) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    with pytest.raises(HubError, match=message):
        model.generate(torch.tensor(PROMPTS[:1]), **arguments)


def test_padding_without_a_mask_is_refused(lora: Path) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    with pytest.raises(HubError, match="row 1 begins with the pad token"):
        model.generate(padded(PROMPTS)["input_ids"])


def test_custom_processors_see_whole_rows(lora: Path) -> None:
    model = PrefillShareModel.from_pretrained(lora)
    seen: list[list[int]] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return scores

    model.generate(
        **padded(PROMPTS), logits_processor=LogitsProcessorList([look]), max_new_tokens=1
    )
    assert sorted(seen) == sorted(PROMPTS)


def test_a_base_that_moved_is_refused_with_both_fingerprints(base: Path, lora: Path) -> None:
    other = load_causal_lm(str(base))
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    moved = base.parent / "moved"
    other.save_pretrained(moved)
    with pytest.raises(ContractError) as error:
        PrefillShareModel.from_pretrained(lora, base=str(moved))
    assert Contract.load(lora).base_fingerprint in str(error.value)
    assert weights_fingerprint(other) in str(error.value)


def test_it_is_public_and_says_what_is_missing(tmp_path: Path) -> None:
    assert prefillshare_train.PrefillShareModel is PrefillShareModel
    with pytest.raises(HubError, match="neither a folder nor a hub id"):
        PrefillShareModel.from_pretrained(tmp_path / "none")
    with pytest.raises(ContractError, match="no prefillshare_contract"):
        PrefillShareModel.from_pretrained(tmp_path)
