"""Processes of their own: the base, and decoders with full weights that read what it wrote."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from tests.vllm.conftest import READY_S, Launcher, core, prompt_of
from tests.vllm.models import FULL, Models
from tests.vllm.store_servers import (
    BLOCK,
    assert_refused,
    complete,
    post,
    prefill,
    store_server,
    stored,
)

from prefillshare_train.engines.vllm.instance import Instance
from prefillshare_train.engines.vllm.process import InstanceError, wait_until_ready

ADA, BOB = FULL
LENGTHS = (32, 33, 64, 97)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def test_a_decoder_over_another_base_does_not_start(
    models: Models, launch: Launcher, store: Path
) -> None:
    other = "sha256:" + "0" * 64
    options = store_server(
        models.folders[ADA],
        "stranger",
        store,
        role="kv_consumer",
        options={"base_fingerprint": other},
    )
    (instance,) = launch(options, ready=False)
    with pytest.raises(InstanceError) as caught:
        wait_until_ready([instance], timeout_s=READY_S)
    log = instance.log.read_text()
    assert f"the contract says '{models.base_fingerprint}', here it is '{other}'" in log
    assert "has ended" in str(caught.value)


@pytest.fixture(scope="module")
def pools(models: Models, launch: Launcher, store: Path) -> dict[str, Instance]:
    """The base; ada, which fails on a miss and caches prefixes; bob, which recomputes."""
    known = {"base_fingerprint": models.base_fingerprint}
    started = launch(
        store_server(models.base, "base", store, role="kv_both", cores=core(0)),
        store_server(
            models.folders[ADA], ADA, store, role="kv_consumer", options=known, cores=core(1)
        ),
        store_server(
            models.folders[BOB],
            BOB,
            store,
            role="kv_consumer",
            cores=core(1),
            options={"base": str(models.base), "on_miss": "recompute"},
        ),
    )
    return dict(zip(("base", ADA, BOB), started, strict=True))


@pytest.fixture(scope="module", autouse=True)
def _references(models: Models) -> None:
    """Answers are made together where they can be, as that is quicker."""
    for name in FULL:
        models.answers(name, [prompt_of(models, length, seed=length) for length in LENGTHS])


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_share_all_but_the_last_token(
    pools: dict[str, Instance], models: Models, length: int
) -> None:
    prompt = prompt_of(models, length, seed=length)
    prefill(pools["base"], prompt)
    for name in FULL:
        assert complete(pools[name], name, prompt) == models.answer(name, prompt)


def test_the_lengths_tell_who_prefilled_what(models: Models) -> None:
    for name in FULL:
        answers = models.answers_by_sharing(name, prompt_of(models, 64, seed=64), BLOCK)
        assert len({tuple(ids) for ids in answers.values()}) == 4, answers


def test_three_turns_across_two_decoders(pools: dict[str, Instance], models: Models) -> None:
    ids = prompt_of(models, 200, seed=22)
    prompt, rest = ids[:80], ids[80:]
    for turn, name in enumerate((ADA, BOB, ADA)):
        prefill(pools["base"], prompt)
        answer = complete(pools[name], name, prompt, max_tokens=20)
        assert answer == models.answer(name, prompt, tokens=20), f"turn {turn}"
        prompt = [*prompt, *answer, *rest[turn * 20 : turn * 20 + 20]]


def test_a_miss_follows_each_decoders_policy(pools: dict[str, Instance], models: Models) -> None:
    prompt = prompt_of(models, 80, seed=23)
    assert_refused(post(pools[ADA], ADA, prompt))
    missed = stored(pools[BOB], "missed_requests")
    assert complete(pools[BOB], BOB, prompt) == models.answer(BOB, prompt, shared=0)
    assert stored(pools[BOB], "missed_requests") == missed + 1
    assert "prefills with the DECODER's weights" in pools[BOB].log.read_text()
    prefill(pools["base"], prompt)
    for name in FULL:
        assert complete(pools[name], name, prompt) == models.answer(name, prompt)
        assert_refused(post(pools[name], name, prompt, prompt_logprobs=1))


def test_a_damaged_block_is_never_read(
    pools: dict[str, Instance], models: Models, store: Path
) -> None:
    prompt = prompt_of(models, 50, seed=24)
    before = set(store.rglob("*.safetensors"))
    prefill(pools["base"], prompt)
    for block in set(store.rglob("*.safetensors")) - before:
        content = block.read_bytes()
        block.write_bytes(content[:-4] + bytes(4))
    assert_refused(post(pools[ADA], ADA, prompt))
    assert stored(pools[ADA], "corrupt_blocks") >= 1
    prefill(pools["base"], prompt)
    prefill(pools["base"], prompt)
    assert complete(pools[ADA], ADA, prompt) == models.answer(ADA, prompt)


def test_a_killed_base_and_its_next_life(pools: dict[str, Instance], models: Models) -> None:
    base = pools["base"]
    prompt, long = prompt_of(models, 97, seed=25), prompt_of(models, 900, seed=26)
    prefill(base, prompt)
    assert base.pid is not None
    with pytest.raises(httpx.HTTPError):
        httpx.post(
            f"{base.url}/v1/completions",
            json={"model": "base", "prompt": long, "max_tokens": 1},
            timeout=httpx.Timeout(30, read=0.3),
            trust_env=False,
        )
    os.killpg(base.pid, signal.SIGKILL)
    begun = time.monotonic()
    assert_refused(post(pools[ADA], ADA, long))
    assert time.monotonic() - begun < 20, "nobody waits for a prefill that died"
    assert complete(pools[ADA], ADA, prompt) == models.answer(ADA, prompt)
    base.stop()
    base.start()
    wait_until_ready([base], timeout_s=READY_S)
    prefill(base, prompt)
    assert stored(base, "loaded_tokens") >= 64, "what it wrote in its first life"
    prefill(base, long)
    assert complete(pools[ADA], ADA, long) == models.answer(ADA, long)
