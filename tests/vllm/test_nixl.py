"""Decoders that pull a base's K/V over NIXL answer as `core.generate` does."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tests.vllm.calls import Deployment, complete, metric, prefill, stream, tokens_of
from tests.vllm.conftest import LENGTHS, READY_S, prompt_of
from tests.vllm.models import FULL, Models

from prefillshare_train.engines.vllm.process import wait_until_ready

BLOCK = 32


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FULL)
def test_a_decoder_reads_all_of_a_prompt_but_its_last_token(
    nixl: Deployment, models: Models, prompts: dict[int, list[int]], name: str, length: int
) -> None:
    prompt = prompts[length]
    assert nixl.answer(name, prompt) == models.answer(name, prompt)


def test_the_model_s_thread_may_run_on_every_core(nixl: Deployment) -> None:
    own = os.sched_getaffinity(0)
    for instance in (nixl.base, *nixl.decoders.values()):
        processes = psutil.Process(instance.pid).children(recursive=True)
        workers = [one.pid for one in processes if one.name().startswith("VLLM::Worker")]
        assert workers, processes
        assert [os.sched_getaffinity(pid) for pid in workers] == [own] * len(workers)


@pytest.mark.parametrize("name", FULL)
def test_other_ways_to_share_would_be_seen(
    models: Models, prompts: dict[int, list[int]], name: str
) -> None:
    answers = models.answers_by_sharing(name, prompts[64], BLOCK)
    assert len({tuple(answer) for answer in answers.values()}) == 4, answers


def test_a_conversation_over_two_decoders(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 45, seed=3)
    for turn, name in enumerate(("ada", "bob", "ada")):
        found = nixl.answer(name, prompt)
        assert found == models.answer(name, prompt), f"turn {turn}"
        prompt = [*prompt, *found, *prompt_of(models, 40, seed=20 + turn)]


def test_streams_at_once(nixl: Deployment, models: Models) -> None:
    jobs = [
        (("ada", "bob")[index % 2], prompt_of(models, 30 + 9 * index, seed=40 + index))
        for index in range(8)
    ]

    def run(job: tuple[str, list[int]]) -> list[int]:
        name, prompt = job
        ticket = prefill(nixl.base, prompt)
        return [token for new in stream(nixl.decoders[name], name, prompt, ticket) for token in new]

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(run, jobs))
    assert found == [models.answer(name, prompt) for name, prompt in jobs]


def test_one_prompt_is_prefilled_anew_for_each_decoder_off_the_base_s_prefix_cache(
    nixl: Deployment, models: Models
) -> None:
    prompt = prompt_of(models, 170, seed=60)
    hits = metric(nixl.base, "vllm:prefix_cache_hits_total")
    for name in ("ada", "bob", "ada"):
        assert nixl.answer(name, prompt) == models.answer(name, prompt)
    assert metric(nixl.base, "vllm:prefix_cache_hits_total") - hits >= 2 * (169 // BLOCK * BLOCK)


def test_a_base_asked_for_more_than_a_prefill_hands_over_no_more(
    nixl: Deployment, models: Models
) -> None:
    prompt = prompt_of(models, 64, seed=61)
    ticket = prefill(nixl.base, prompt, max_tokens=40)
    found = tokens_of(complete(nixl.decoders["bob"], "bob", prompt, ticket))
    assert found == models.answer("bob", prompt)


def test_an_aborted_stream_leaves_nothing_running(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 70, seed=70)
    ada = nixl.decoders["ada"]
    answer = stream(ada, "ada", prompt, prefill(nixl.base, prompt), max_tokens=800)
    assert next(answer)
    answer.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 30
    while metric(ada, "vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    assert metric(ada, "vllm:num_requests_running") == 0
    assert metric(ada, "vllm:kv_cache_usage_perc") == 0
    assert nixl.answer("ada", prompt) == models.answer("ada", prompt)


def test_a_base_that_was_killed_and_started_again(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 80, seed=80)
    assert nixl.answer("bob", prompt) == models.answer("bob", prompt)
    old = prefill(nixl.base, prompt)
    assert nixl.base.pid is not None
    os.killpg(nixl.base.pid, signal.SIGKILL)
    lost = complete(nixl.decoders["bob"], "bob", prompt, old)
    assert lost.status_code == 500, lost.text
    nixl.base.stop()
    nixl.base.start()
    wait_until_ready([nixl.base], timeout_s=READY_S)
    assert complete(nixl.decoders["bob"], "bob", prompt, old).status_code == 500
    for name in ("ada", "bob"):
        assert nixl.answer(name, prompt) == models.answer(name, prompt)
