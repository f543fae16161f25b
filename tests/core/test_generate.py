"""Generation off a shared cache equals transformers' own, row by row and in any company."""

from __future__ import annotations

import pytest
import torch
from tests.core import families

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.generate import generate
from prefillshare_train.core.modules import PrefillModule

PROMPT_LENGTHS = (3, 17, 33, 17, 50)
NEW = 20


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, families.VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS
    ]


def cut(rows: list[list[int]], rule: str = "last_token") -> list[list[int]]:
    parsed = BoundaryRule.parse(rule)
    return [ids[: parsed.base_length(len(ids), 2)] for ids in rows]


@pytest.mark.parametrize("rule", ["last_token", "block_aligned:8", "ratio:0"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "granite"])
def test_the_base_as_its_own_decoder_equals_transformers(family: str, rule: str) -> None:
    model = families.build(family, torch.float64)
    rows = prompts()
    cache = PrefillModule(model).prefill(cut(rows, rule))
    answers = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    reference = families.reference_copy(model)
    for ids, answer in zip(rows, answers, strict=True):
        expected = reference.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, len(ids) :].tolist()


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
