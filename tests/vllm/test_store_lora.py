"""One process: the base and LoRA decoders, with vLLM's prefix cache on and little room for K/V."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time

import httpx
import pytest
from tests.vllm.conftest import Launcher, core, prompt_of
from tests.vllm.models import LORA, Models
from tests.vllm.store_servers import (
    BLOCK,
    assert_refused,
    complete,
    count,
    post,
    prefill,
    store_server,
    stored,
    together,
)

from prefillshare_train.core.contract import CONTRACT_NAME, Contract
from prefillshare_train.engines.vllm.instance import Instance

ADA, BOB = LORA
# 33 and 65: the last token alone lies in a new block. 97 is prefilled in three chunks.
LENGTHS = (31, 32, 33, 34, 64, 65, 97)
ROOM = 34
"""Blocks of the whole instance: one longest request and two blocks more."""


@pytest.fixture(scope="module")
def folders(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The adapters, one under another boundary rule, and one without a contract."""
    root = tmp_path_factory.mktemp("adapters")
    blocks, stray = root / "blocks", root / "stray"
    for copy in (blocks, stray):
        shutil.copytree(models.folders[ADA], copy)
    contract = Contract.load(blocks)
    dataclasses.replace(contract, boundary=f"block_aligned:{BLOCK}").save(blocks)
    (stray / CONTRACT_NAME).unlink()
    named = {name: models.folders[name] for name in LORA} | {"blocks": blocks, "stray": stray}
    return {name: str(folder) for name, folder in named.items()}


@pytest.fixture(scope="module")
def pool(
    models: Models,
    folders: dict[str, str],
    launch: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Instance:
    checked = {name: folder for name, folder in folders.items() if name != "stray"}
    options = store_server(
        models.base,
        "base",
        tmp_path_factory.mktemp("store"),
        role="kv_both",
        options={"decoders": checked},
        lora=folders,
        max_lora_rank=8,
        cores=core(0),
        extra=("--max-num-batched-tokens", "48", "--num-gpu-blocks-override", str(ROOM)),
    )
    (instance,) = launch(options)
    return instance


@pytest.fixture(scope="module", autouse=True)
def _references(models: Models) -> None:
    """Answers are made together where they can be, as that is quicker."""
    prompts = [prompt_of(models, length, seed=1) for length in LENGTHS]
    for name in LORA:
        models.answers(name, prompts)
        models.answers(name, _crowd(models)[LORA.index(name) :: 2], tokens=16)


def _crowd(models: Models) -> list[list[int]]:
    """More than there is room for: four blocks each, and a fifth before the answer's end."""
    return [prompt_of(models, 120 + number, seed=10 + number) for number in range(8)]


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_share_all_but_the_last_token(pool: Instance, models: Models, length: int) -> None:
    prompt = prompt_of(models, length, seed=1)
    prefill(pool, prompt)
    for name in LORA:
        assert complete(pool, name, prompt) == models.answer(name, prompt)


@pytest.mark.parametrize("name", LORA)
def test_other_ways_to_share_would_be_seen(models: Models, name: str) -> None:
    """Without this, the test above could pass whatever is shared."""
    prompts = [prompt_of(models, length, seed=1) for length in LENGTHS]
    whole = models.answers(name, prompts)
    others = {
        "base alone": models.answers("base", prompts),
        "decoder alone": models.answers(name, prompts, shared=[0] * len(prompts)),
        "whole blocks": models.answers(
            name, prompts, shared=[(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
        ),
    }
    assert [how for how, answers in others.items() if answers == whole] == []


def test_another_boundary_rule_is_served_as_trained(pool: Instance, models: Models) -> None:
    prompt = prompt_of(models, 64, seed=1)
    prefill(pool, prompt)
    expected = models.answers_by_sharing(ADA, prompt, BLOCK)
    assert complete(pool, "blocks", prompt) == expected["whole blocks"]
    assert complete(pool, ADA, prompt) == expected["all but the last"]


def test_turns_of_two_decoders_never_read_a_decoders_own_blocks(
    pool: Instance, models: Models
) -> None:
    ids = prompt_of(models, 200, seed=2)
    prompt, rest = ids[:80], ids[80:]
    for turn, name in enumerate((ADA, BOB, ADA)):
        prefill(pool, prompt)
        answer = complete(pool, name, prompt, max_tokens=20)
        assert answer == models.answer(name, prompt, tokens=20), f"turn {turn}"
        # Long enough that each turn fills blocks which the next one's prompt holds too.
        prompt = [*prompt, *answer, *rest[turn * 20 : turn * 20 + 20]]


def test_concurrent_requests_under_preemption(pool: Instance, models: Models) -> None:
    before = count(pool, "vllm:num_preemptions")
    prompts = _crowd(models)

    def ask(number: int) -> list[int]:
        prefill(pool, prompts[number])
        return complete(pool, LORA[number % 2], prompts[number], max_tokens=16)

    answers = together(functools.partial(ask, number) for number in range(8))
    for number, answer in enumerate(answers):
        assert answer == models.answer(LORA[number % 2], prompts[number], tokens=16)
    assert count(pool, "vllm:num_preemptions") > before


def test_a_decoder_waits_for_a_prefill_under_way(pool: Instance, models: Models) -> None:
    prompt = prompt_of(models, 400, seed=3)
    before = stored(pool, "waited_requests")

    def late() -> list[int]:
        time.sleep(0.15)
        return complete(pool, ADA, prompt)

    _, answer = together([functools.partial(prefill, pool, prompt), late])
    assert answer == models.answer(ADA, prompt)
    assert stored(pool, "waited_requests") > before


def test_a_miss_fails_alone(pool: Instance, models: Models) -> None:
    known, unknown = prompt_of(models, 97, seed=1), prompt_of(models, 96, seed=4)
    prefill(pool, known)
    refused = stored(pool, "refused_requests")
    answers = together(
        [
            functools.partial(post, pool, ADA, unknown),
            functools.partial(post, pool, BOB, known),
            functools.partial(post, pool, BOB, unknown),
        ]
    )
    assert_refused(answers[0])
    assert_refused(answers[2])
    assert answers[1].json()["choices"][0]["token_ids"] == models.answer(BOB, known)
    assert stored(pool, "refused_requests") == refused + 2
    prefill(pool, unknown)
    assert complete(pool, ADA, unknown) == models.answer(ADA, unknown)


def test_a_base_request_after_a_miss_reads_nothing_of_it(pool: Instance, models: Models) -> None:
    prompt = prompt_of(models, 100, seed=5)
    assert_refused(post(pool, ADA, prompt))
    assert complete(pool, "base", prompt) == models.answer("base", prompt)


def test_the_base_beside_adapters_is_the_base(pool: Instance, models: Models) -> None:
    """All of vLLM's slots are full here: its build for CPU would take the last one's adapter."""
    prompts = [prompt_of(models, 60 + number, seed=20 + number) for number in range(3)]
    expected = models.answers("base", prompts, tokens=32)
    known = prompt_of(models, 97, seed=1)
    prefill(pool, known)
    decoding = functools.partial(complete, pool, ADA, known, max_tokens=64)
    answers = together(
        [decoding] + [functools.partial(complete, pool, "base", p, max_tokens=32) for p in prompts]
    )
    assert answers[1:] == expected
    for prompt in prompts:
        assert complete(pool, BOB, prompt) == models.answer(BOB, prompt)


def test_an_adapter_without_a_contract_is_not_answered(pool: Instance, models: Models) -> None:
    for prompt in (prompt_of(models, 64, seed=1), prompt_of(models, 1, seed=1)):
        prefill(pool, prompt)
        assert_refused(post(pool, "stray", prompt))


@pytest.mark.parametrize("values", [{"prompt_logprobs": 1}])
def test_what_would_prefill_with_the_decoder_is_refused(
    pool: Instance, models: Models, values: dict[str, int]
) -> None:
    prompt = prompt_of(models, 64, seed=1)
    prefill(pool, prompt)
    assert_refused(post(pool, ADA, prompt, **values))


def test_tenants_with_other_salts_share_nothing(pool: Instance, models: Models) -> None:
    prompt = prompt_of(models, 70, seed=6)
    prefill(pool, prompt, cache_salt="one")
    assert_refused(post(pool, ADA, prompt))
    assert_refused(post(pool, ADA, prompt, cache_salt="two"))
    assert complete(pool, ADA, prompt, cache_salt="one") == models.answer(ADA, prompt)


def test_aborted_streams_leave_nothing_behind(pool: Instance, models: Models) -> None:
    prompt = prompt_of(models, 90, seed=7)
    prefill(pool, prompt)
    body = {"model": ADA, "prompt": prompt, "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{pool.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as answer:
        next(answer.iter_lines())
    # A prefill that is aborted halfway has told others to wait for it.
    long = prompt_of(models, 500, seed=8)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{pool.url}/v1/completions",
            json={"model": "base", "prompt": long, "max_tokens": 1},
            timeout=httpx.Timeout(30, read=0.2),
            trust_env=False,
        )
    assert complete(pool, BOB, prompt) == models.answer(BOB, prompt)
    prefill(pool, long)
    assert complete(pool, BOB, long) == models.answer(BOB, long)


def test_the_counters_are_on_the_servers_metrics(pool: Instance) -> None:
    for name in ("hit_requests", "loaded_tokens", "written_blocks", "written_bytes"):
        assert stored(pool, name) > 0
    assert stored(pool, "missed_requests") == 0
    assert stored(pool, "corrupt_blocks") == 0
