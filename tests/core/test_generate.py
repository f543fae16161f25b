"""Generation off a shared cache equals transformers' own, row by row and in any company."""

from __future__ import annotations

import pytest
import torch
from tests.core import families
from tests.core.generating import NEW, cut, plainly, prompts
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TopKLogitsWarper,
)

from prefillshare_train.core.generate import generate
from prefillshare_train.core.modules import PrefillModule


@pytest.mark.parametrize("rule", ["last_token", "block_aligned:8", "ratio:0"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "granite"])
def test_the_base_as_its_own_decoder_equals_transformers(family: str, rule: str) -> None:
    model = families.build(family, torch.float64)
    rows = prompts()
    cache = PrefillModule(model).prefill(cut(rows, rule))
    answers = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    reference = families.reference_copy(model)
    for ids, answer in zip(rows, answers, strict=True):
        assert answer == plainly(reference, ids)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_in_float32_equals_transformers(family: str) -> None:
    model, rows = families.build(family, torch.float32), prompts()
    cache = PrefillModule(model).prefill(cut(rows))
    answers = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    reference = families.reference_copy(model)
    for ids, answer in zip(rows, answers, strict=True):
        assert answer == plainly(reference, ids)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_lora_decoder_answers_as_one_that_was_merged(family: str) -> None:
    base = families.build(family)
    merged = families.with_lora(families.build(family), target_modules=["q_proj", "v_proj"])
    plain = families.reference_copy(merged.merge_and_unload())
    reference_base = families.reference_copy(base)
    decoder = families.with_lora(base, target_modules=["q_proj", "v_proj"])
    rows = prompts()
    cache = PrefillModule(decoder).prefill(cut(rows))
    answers = generate(decoder, cache, rows, max_new_tokens=8, stop_ids=())
    for ids, answer in zip(rows, answers, strict=True):
        with torch.no_grad():
            held = reference_base(torch.tensor([ids[:-1]]), use_cache=True).cache
            token, expected = ids[-1], []
            for _ in range(8):
                output = plain(torch.tensor([[token]]), cache=held, use_cache=True)
                token, held = int(output.logits[0, -1].argmax()), output.cache
                expected.append(token)
        assert answer == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_later_turn_prefills_only_what_is_new(family: str) -> None:
    base = families.build(family)
    prefill, decoder = PrefillModule(base), families.perturbed(base)
    rows = prompts()
    cache = prefill.prefill(cut(rows))
    answers = generate(decoder, cache, rows, max_new_tokens=7, stop_ids=(5, 9))
    later = [
        [*ids, *answer, *following]
        for ids, answer, following in zip(rows, answers, prompts(seed=1), strict=True)
    ]
    new = [ids[n:-1] for ids, n in zip(later, cache.lengths, strict=True)]
    partial = prefill.prefill(new, cache)
    whole = prefill.prefill(cut(later))
    assert partial.lengths == whole.lengths
    found, expected = (
        generate(decoder, held, later, max_new_tokens=NEW, stop_ids=()) for held in (partial, whole)
    )
    assert found == expected


def test_one_prefill_serves_two_decoders_in_any_order() -> None:
    base = families.build("qwen3", torch.float32)
    first, second = families.perturbed(base, seed=1), families.perturbed(base, seed=2)
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))
    before = [t.clone() for t in (*cache.keys, *cache.values)]

    def answer(decoder: torch.nn.Module) -> list[list[int]]:
        return generate(decoder, cache, rows, max_new_tokens=NEW, stop_ids=())

    one, two = answer(first), answer(second)
    assert (answer(second), answer(first)) == (two, one)
    assert one != two
    after = (*cache.keys, *cache.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_row_does_not_depend_on_its_batch() -> None:
    base = families.build("llama", torch.float64)
    decoder = families.perturbed(base)
    prefill, rows = PrefillModule(base), prompts()
    together = generate(
        decoder, prefill.prefill(cut(rows)), rows, max_new_tokens=NEW, stop_ids=(5, 9)
    )
    for ids, expected in zip(rows, together, strict=True):
        alone = prefill.prefill(cut([ids]))
        assert generate(decoder, alone, [ids], max_new_tokens=NEW, stop_ids=(5, 9)) == [expected]


def test_stop_ids_end_a_row_and_are_kept() -> None:
    base = families.build("llama", torch.float64)
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))
    free = generate(base, cache, rows, max_new_tokens=NEW, stop_ids=())
    stop = free[0][4]
    stopped = generate(base, cache, rows, max_new_tokens=NEW, stop_ids=(stop,))
    for long, short in zip(free, stopped, strict=True):
        expected = long[: long.index(stop) + 1] if stop in long else long
        assert short == expected


def test_partial_prefill_equals_a_whole_one() -> None:
    base = families.build("gemma3_text", torch.float64)
    prefill, rows = PrefillModule(base), prompts()
    heads = [ids[: len(ids) // 2] for ids in rows]
    tails = [ids[len(ids) // 2 :] for ids in rows]
    parts = prefill.prefill(tails, prefill.prefill(heads))
    whole = prefill.prefill(rows)
    assert parts.lengths == whole.lengths
    for a, b in zip((*parts.keys, *parts.values), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_sampling_repeats_with_its_seed() -> None:
    base = families.build("llama", torch.float32)
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))

    def sample(seed: int) -> list[list[int]]:
        sampler = torch.Generator().manual_seed(seed)
        return generate(base, cache, rows, max_new_tokens=9, stop_ids=(), sampler=sampler)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_cache_of_the_whole_prompt_is_refused() -> None:
    base = families.build("llama", torch.float32)
    cache = PrefillModule(base).prefill(prompts())
    with pytest.raises(ValueError, match="must run the last one"):
        generate(base, cache, prompts(), max_new_tokens=1, stop_ids=())
    with pytest.raises(ValueError, match="2 prompts, but a cache of 5"):
        generate(base, cache, prompts()[:2], max_new_tokens=1, stop_ids=())


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
@pytest.mark.parametrize(
    ("base_dtype", "decoder_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["narrow base", "wide base"],
)
def test_the_decoder_reads_the_cache_in_its_own_dtype(
    family: str, base_dtype: torch.dtype, decoder_dtype: torch.dtype
) -> None:
    base, decoder = families.build(family, base_dtype), families.build(family, decoder_dtype)
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows, "ratio:0.5"))
    assert cache.dtype == base_dtype
    answers = generate(decoder, cache, rows, max_new_tokens=6, stop_ids=())
    cast = cache.to(decoder_dtype)
    assert answers == generate(decoder, cast, rows, max_new_tokens=6, stop_ids=())


class Watching(LogitsProcessor):
    """Forbids one token and keeps what it was shown."""

    def __init__(self, forbidden: int) -> None:
        self.forbidden = forbidden
        self.shown: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids.tolist())
        return scores.index_fill(1, torch.tensor([self.forbidden]), float("-inf"))


def test_processors_see_prompt_and_answer_and_are_obeyed() -> None:
    base = families.build("llama")
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))
    free = generate(base, cache, rows, max_new_tokens=5, stop_ids=())
    watching = Watching(free[0][0])
    answers = generate(
        base, cache, rows, max_new_tokens=5, stop_ids=(), processors=LogitsProcessorList([watching])
    )
    assert free[0][0] not in {token for answer in answers for token in answer}
    assert len(watching.shown) == 5
    for step, shown in enumerate(watching.shown):
        for ids, answer, row in zip(rows, answers, shown, strict=True):
            seen = ids + answer[:step]
            assert row == [0] * (len(row) - len(seen)) + seen


def test_a_least_length_holds_for_every_row_though_others_end() -> None:
    base = families.build("llama")
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))
    reference = families.reference_copy(base)
    free = generate(base, cache, rows, max_new_tokens=NEW, stop_ids=())
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    stops = sorted({free[longest][4], *(answer[7] for answer in free)})
    least = MinNewTokensLengthLogitsProcessor(len(rows[longest]), 4, stops)
    answers = generate(
        base,
        cache,
        rows,
        max_new_tokens=NEW,
        stop_ids=stops,
        processors=LogitsProcessorList([least]),
    )
    assert len({len(answer) for answer in answers}) > 1, "rows end at different steps"
    for ids, answer in zip(rows, answers, strict=True):
        assert answer == plainly(reference, ids, eos_token_id=stops, min_new_tokens=4)


def test_a_warper_narrows_what_is_sampled() -> None:
    base = families.build("llama", torch.float32)
    rows = prompts()
    cache = PrefillModule(base).prefill(cut(rows))
    greedy = generate(base, cache, rows, max_new_tokens=6, stop_ids=())
    sampled = generate(
        base,
        cache,
        rows,
        max_new_tokens=6,
        stop_ids=(),
        processors=LogitsProcessorList([TopKLogitsWarper(1)]),
        sampler=torch.Generator().manual_seed(3),
    )
    assert sampled == greedy


def test_tokens_are_reported_as_they_come() -> None:
    base = families.build("llama", torch.float32)
    rows, heard = prompts(), []
    cache = PrefillModule(base).prefill(cut(rows))
    answers = generate(
        base,
        cache,
        rows,
        max_new_tokens=4,
        stop_ids=(),
        on_token=lambda row, token: heard.append((row, token)),
    )
    assert heard == [(row, answers[row][i]) for i in range(4) for row in range(len(rows))]


def test_responses_are_reported_as_their_rows_end() -> None:
    base = families.build("llama", torch.float32)
    rows, heard = prompts(), []
    cache = PrefillModule(base).prefill(cut(rows))
    lengths = dict(enumerate([5, 1, 3, 2, 4]))
    answers = generate(
        base,
        cache,
        rows,
        max_new_tokens=5,
        stop_ids=(),
        should_stop=lambda row, response: len(response) == lengths[row],
        on_response=lambda row, response: heard.append((row, list(response))),
        batch_size=2,
    )
    assert sorted(heard) == list(enumerate(answers))
    assert heard != sorted(heard), "rows must end out of order for this to say anything"


def test_generating_while_training_leaves_every_mode_as_it_was() -> None:
    base = families.build("llama", torch.float32)
    decoder = families.with_lora(base, lora_dropout=0.5).train()
    decoder.get_base_model().model.layers[1].eval()
    modes = {name: module.training for name, module in decoder.named_modules()}
    rows = prompts()
    prefill = PrefillModule(decoder)
    first, second = (
        generate(decoder, prefill.prefill(cut(rows)), rows, max_new_tokens=9, stop_ids=())
        for _ in range(2)
    )
    assert first == second, "dropout must be off"
    assert {name: module.training for name, module in decoder.named_modules()} == modes


def test_positions_past_the_rope_limit_are_refused_before_any_work() -> None:
    base = families.build("llama_dynamic_rope", torch.float32)
    rows = [list(range(1, 71))]
    cache = PrefillModule(base).prefill(cut(rows))
    # The last token is never run, so 11 answer tokens after 70 end at position 79.
    answers = generate(base, cache, rows, max_new_tokens=11, stop_ids=())
    assert len(answers[0]) == 11
    with pytest.raises(ValueError, match="position 80 is past 80"):
        generate(base, cache, rows, max_new_tokens=12, stop_ids=())
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more"):
        generate(base, cache, rows, max_new_tokens=0, stop_ids=())
