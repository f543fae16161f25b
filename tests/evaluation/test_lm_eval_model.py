"""lm-eval on a base and a decoder: what HFLM says where the two are one, and nothing else changed.

Tolerances: float32 on tiny models; log-likelihoods agree to 1e-4 nats, texts exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tests.data.helpers import CHATML, WITH_BOS, tiny_tokenizer
from tests.evaluation.lm_eval_helpers import decoder_of, generation, make_decoders, scoring
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import LoadedDecoder, load_decoder
from prefillshare_train.core.modules import PrefillModule, load_causal_lm
from prefillshare_train.data import make_renderer, saved_renderer
from prefillshare_train.evaluation.lm_eval_model import PrefillShareLM
from prefillshare_train.evaluation.task import EvaluationError

TOLERANCE = 1e-4
CONTEXTS = ["Say 4.", "What is 12 + 7?\nAnswer:", "x", "the the the a a", "Question: why? "]
PAIRS = [
    ("Is it so?", " yes"),
    ("Is it so?", " no"),
    ("Is it so?", " certainly not"),
    ("It is ", "the end"),
    ("A:", "A:"),
    ("", "nothing before"),
    ("Tell me more about it, please.", "."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and LoRA decoders of both methods and one with another boundary trained over it."""
    return make_decoders(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def hf(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder / "base"), dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def same(folder: Path) -> Callable[..., PrefillShareLM]:
    """A decoder whose weights are its base's."""
    contract = load_decoder(folder / "decoder" / "decoder").contract
    renderer = make_renderer(AutoTokenizer.from_pretrained(folder / "base"))
    loaded = LoadedDecoder(
        load_causal_lm(str(folder / "base"), dtype=torch.float32).eval(),
        PrefillModule(load_causal_lm(str(folder / "base"), dtype=torch.float32)),
        contract,
    )

    def make(boundary: str = "last_token", **options: Any) -> PrefillShareLM:
        changed = replace(loaded, contract=replace(contract, boundary=boundary))
        return PrefillShareLM(loaded=changed, renderer=renderer, **options)

    return make


def assert_same_scores(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=TOLERANCE)


@pytest.mark.parametrize("boundary", ["last_token", "block_aligned:4", "ratio:0.5"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_decoder_that_is_its_base_generates_what_hflm_does(
    same: Callable[..., PrefillShareLM], hf: HFLM, boundary: str, batch_size: int
) -> None:
    requests = generation(*CONTEXTS)
    expected = hf.generate_until(requests)
    assert len(set(expected)) > 2
    found = same(boundary, batch_size=batch_size).generate_until(requests)
    assert found == expected


def test_stop_strings_cut_what_hflm_cuts(same: Callable[..., PrefillShareLM], hf: HFLM) -> None:
    free = hf.generate_until(generation(*CONTEXTS))
    cuts = [text[3:5] for text in free if len(text) > 6]
    assert len(cuts) >= 2
    requests = generation(*CONTEXTS, until=[*cuts, free[0][1]])
    expected = hf.generate_until(requests)
    assert sum(map(len, expected)) < sum(map(len, free))
    lm = same(batch_size=2)
    assert lm.generate_until(requests) == expected
    mixed = [*generation(CONTEXTS[0], until=cuts[0]), *generation(CONTEXTS[0], max_gen_toks=2)]
    assert lm.generate_until(mixed) == hf.generate_until(mixed)


def test_a_stop_string_ends_the_work_too(
    same: Callable[..., PrefillShareLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = same(batch_size=2)
    lengths: list[int] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        responses = generate(*arguments, **options)
        lengths.extend(map(len, responses))
        return responses

    monkeypatch.setattr("prefillshare_train.evaluation.lm_eval_model.generate", spy)
    (free,) = lm.generate_until(generation("Say 4.", until=[""]))
    assert lengths == [12], "an empty stop string stops nothing"
    assert lm.generate_until(generation("Say 4.", until=free[2:4])) == [
        free[: free.find(free[2:4])]
    ]
    assert lengths[1] < 8


def test_tokens_that_are_no_text_are_left_out(
    same: Callable[..., PrefillShareLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, renderer = same().loaded, same().prompts.renderer
    full_stop, start = renderer.encode([".", "<|im_start|>"])
    renderer = replace(renderer, end_token_ids=(*renderer.end_token_ids, *full_stop))
    ids = [*renderer.encode(["a. b"])[0], *start, *renderer.encode(["c."])[0]]
    monkeypatch.setattr(
        "prefillshare_train.evaluation.lm_eval_model.generate", lambda *_, **__: [ids]
    )
    lm = PrefillShareLM(loaded=loaded, renderer=renderer)
    assert lm.generate_until(generation("x")) == ["a. bc"]


@pytest.mark.parametrize("boundary", ["last_token", "ratio:0", "block_aligned:3"])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_decoder_that_is_its_base_scores_as_hflm_does(
    same: Callable[..., PrefillShareLM], hf: HFLM, boundary: str, batch_size: int
) -> None:
    greedy = [(context, text) for context, text in _greedy_pairs(hf)]
    requests = scoring(*PAIRS, *greedy)
    expected = hf.loglikelihood(requests)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    assert_same_scores(same(boundary, batch_size=batch_size).loglikelihood(requests), expected)


def _greedy_pairs(hf: HFLM) -> list[tuple[str, str]]:
    """Continuations of one token that the base itself would say."""
    pairs = []
    for context in ("Is it so", "Tell me"):
        with torch.no_grad():
            token = hf.model(torch.tensor([hf.tok_encode(context)])).logits[0, -1].argmax()
        pairs.append((context, hf.tokenizer.decode(token)))
    return pairs


def test_long_prompts_are_cut_as_hflm_cuts_them(
    same: Callable[..., PrefillShareLM], folder: Path
) -> None:
    hf = HFLM(pretrained=str(folder / "base"), dtype="float32", device="cpu", max_length=24)
    lm = same(max_length=24, batch_size=2)
    requests = generation("0123456789 abcdefghijklm the a the", "short")
    assert lm.generate_until(requests) == hf.generate_until(requests)
    pairs = scoring(("0123456789 abcdefghijklm the a", " the end"), ("x", "y"))
    assert_same_scores(lm.loglikelihood(pairs), hf.loglikelihood(pairs))
    with pytest.raises(EvaluationError, match="leaves no room for a prompt"):
        lm.generate_until(generation("x", max_gen_toks=24))
    with pytest.raises(EvaluationError, match="a continuation has 26 tokens"):
        lm.loglikelihood(scoring(("x", "y" * 26)))


def test_alone_a_lora_decoder_is_what_hflm_makes_of_it_with_peft(folder: Path) -> None:
    place = str(folder / "decoder" / "decoder")
    hf = HFLM(
        pretrained=str(folder / "base"), peft=place, dtype="float32", device="cpu", batch_size=1
    )
    lm = decoder_of(folder, prefill="self", batch_size=3)
    assert_same_scores(lm.loglikelihood(scoring(*PAIRS)), hf.loglikelihood(scoring(*PAIRS)))
    assert lm.generate_until(generation(*CONTEXTS)) == hf.generate_until(generation(*CONTEXTS))


def reference_score(folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """A plain two-pass reading with transformers' own cache: base first, then the adapters."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "decoder" / "decoder")).eval()
    prompt, answer = tokenizer.encode(context), tokenizer.encode(continuation)
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(torch.tensor([prompt[:-1]])).past_key_values
        ids = torch.tensor([[prompt[-1], *answer[:-1]]])
        logits = model(ids, past_key_values=cache).logits[0].log_softmax(-1)
    score = logits[range(len(answer)), answer].sum().item()
    return score, logits.argmax(-1).tolist() == answer


def test_a_decoder_is_scored_off_its_bases_cache(folder: Path) -> None:
    pairs = [("Say 7.", "7!"), ("Say 7.", "8!"), ("Say 12 or not.", "12!")]
    lm = decoder_of(folder, batch_size=3)
    found = lm.loglikelihood(scoring(*pairs))
    expected = [reference_score(folder, *pair) for pair in pairs]
    assert_same_scores(found, expected)
    alone = decoder_of(folder, prefill="self").loglikelihood(scoring(*pairs))
    assert all(abs(a - b) > 10 * TOLERANCE for (a, _), (b, _) in zip(found, alone, strict=True))


@pytest.mark.parametrize("name", ["decoder", "header"])
def test_batches_change_nothing(folder: Path, name: str) -> None:
    one, many = (decoder_of(folder, name, batch_size=n) for n in (1, 4))
    contexts = [
        one.apply_chat_template([{"role": "user", "content": text}]) for text in CONTEXTS * 3
    ]
    requests = generation(*contexts)
    assert one.generate_until(requests) == many.generate_until(requests)
    pairs = scoring(*((context, answer) for context in contexts for answer in ("yes", "7!")))
    assert_same_scores(many.loglikelihood(pairs), one.loglikelihood(pairs))


def test_what_the_decoder_was_trained_for_is_the_default(folder: Path) -> None:
    pairs = scoring(*PAIRS)

    def scores(name: str, **options: Any) -> list[tuple[float, bool]]:
        return decoder_of(folder, name, **options).loglikelihood(pairs)

    assert scores("full_prompt") == scores("full_prompt", prefill="self")
    assert scores("full_prompt") != scores("full_prompt", prefill="base")
    assert scores("decoder") == scores("decoder", prefill="base")
    assert decoder_of(folder).get_model_info()["prefill"] == "base"


def test_chat_prompts_are_those_of_training(folder: Path) -> None:
    lm = decoder_of(folder)
    renderer = saved_renderer(folder / "decoder" / "decoder", lm.loaded.contract.prompt)
    messages = [{"role": "user", "content": "Say 3."}]
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == renderer.prompt_ids(messages)
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == text + "It is"
    assert lm.chat_template(True) == renderer.template
    assert lm.tokenizer_name.startswith("prefillshare-")


def test_a_bos_that_training_never_saw_is_not_added(same: Callable[..., PrefillShareLM]) -> None:
    loaded = same().loaded
    for template, expected in ((CHATML, 0), (WITH_BOS, 1)):
        tokenizer = tiny_tokenizer(template, bos="<s>", adds_bos=True)
        renderer = make_renderer(tokenizer)
        lm = PrefillShareLM(loaded=loaded, renderer=renderer)
        chat = lm.apply_chat_template([{"role": "user", "content": "hi"}])
        assert lm.tok_encode(chat).count(tokenizer.bos_token_id) == expected
        assert lm.tok_encode("plain").count(tokenizer.bos_token_id) == expected
        assert lm.tok_encode("plain", add_special_tokens=False)[0] != tokenizer.bos_token_id


def test_the_assistant_header_is_run_by_the_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = decoder_of(folder, "header")
    asked: list[int] = []
    prefill = lm.loaded.prefill.prefill

    def spy(prompts: Any) -> Any:
        asked.extend(len(ids) for ids in prompts)
        return prefill(prompts)

    monkeypatch.setattr(lm.loaded.prefill, "prefill", spy)
    messages = [
        {"role": "user", "content": "Say 3."},
        {"role": "assistant", "content": "3!"},
        {"role": "user", "content": "Say 4."},
    ]
    text = lm.apply_chat_template(messages)
    bare = len(lm.tok_encode(text[: text.rfind("<|im_start|>")]))
    begun = lm.apply_chat_template(
        [*messages, {"role": "assistant", "content": "It is "}], add_generation_prompt=False
    )
    lm.generate_until(generation(text, begun))
    lm.loglikelihood(scoring((text, "4!"), (begun, "4!")))
    assert asked == [bare] * 4
    for call in (
        lambda: lm.generate_until(generation("no header")),
        lambda: lm.loglikelihood(scoring(("no header", " x"))),
    ):
        with pytest.raises(EvaluationError, match="--apply_chat_template"):
            call()


def test_sampling_is_honoured_and_seeded(folder: Path) -> None:
    lm = decoder_of(folder, batch_size=2)

    def draw(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return lm.generate_until(generation(*["Say 5."] * 5, do_sample=True, **options))

    hot = {"temperature": 3.0}
    assert len(set(draw(1, **hot))) > 1
    assert draw(1, **hot) == draw(1, **hot)
    assert draw(1, **hot) != draw(2, **hot)
    greedy = lm.generate_until(generation("Say 5."))
    assert set(draw(1, temperature=3.0, top_k=1)) == set(greedy)
    assert set(draw(1, temperature=1e-4)) == set(greedy)


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"num_beams": 4}, "cannot honour: num_beams"),
        ({"repetition_penalty": 1.2, "max_length": 9}, "honour: max_length, repetition_penalty"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    folder: Path, gen_kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        decoder_of(folder).generate_until(generation("x", **gen_kwargs))


def test_rolling_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="no prompt"):
        decoder_of(folder).loglikelihood_rolling([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "decoder=DIR"),
        ({"decoder": "x", "prefill": "both"}, "prefill=both"),
        ({"decoder": "x", "batch_size": "auto"}, "batch_size=auto"),
        ({"decoder": "x", "batch_size": 0}, "batch_size=0"),
        ({"decoder": "x", "dtype": "float33"}, "dtype=float33"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        PrefillShareLM(**arguments)


def test_a_killed_run_keeps_what_it_had_answered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = decoder_of(folder, batch_size=1)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    requests = generation(*(f"Say {n}." for n in range(6)))
    calls: list[int] = []

    def dies(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr("prefillshare_train.evaluation.lm_eval_model.generate", dies)
    with pytest.raises(KeyboardInterrupt):
        cached.generate_until(requests)
    assert cached.generate_until(requests) == lm.generate_until(requests)
    answered, killed, rest = calls[:3]
    assert (answered, killed) == (4, 2)
    assert rest == 2, "answered twice"
