"""What would give wrong tokens without an error on stock vLLM is refused here."""

from __future__ import annotations

import dataclasses
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.vllm.calls import ASK, Deployment, complete, prefill, stream, tokens_of
from tests.vllm.conftest import (
    READY_S,
    Launcher,
    nixl_server,
    prompt_of,
)
from tests.vllm.models import Models

from prefillshare_train.core.contract import Contract
from prefillshare_train.engines.vllm.instance import Instance
from prefillshare_train.engines.vllm.process import InstanceError, wait_until_ready

SHORTEST_LEASE_S = 6
FAILED = 500
"""What vLLM answers where the connector fails a request."""


def test_a_prefill_is_good_for_one_decode(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 75, seed=100)
    ticket = prefill(nixl.base, prompt)
    found = tokens_of(complete(nixl.decoders["ada"], "ada", prompt, ticket))
    assert found == models.answer("ada", prompt)
    # Other prompts take the blocks that are free now, as they would under load.
    for seed in range(101, 104):
        prefill(nixl.base, prompt_of(models, 75, seed=seed))
    for name in ("bob", "ada"):
        assert complete(nixl.decoders[name], name, prompt, ticket).status_code == FAILED


def test_of_two_that_use_it_at_once_one_is_refused(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 130, seed=110)
    for _ in range(3):
        ticket = prefill(nixl.base, prompt)
        with ThreadPoolExecutor(2) as pool:
            tries = {
                name: pool.submit(complete, nixl.decoders[name], name, prompt, ticket)
                for name in ("ada", "bob")
            }
        answers = {name: future.result() for name, future in tries.items()}
        assert sorted(answer.status_code for answer in answers.values()) == [200, FAILED]
        for name, answer in answers.items():
            if answer.status_code == 200:
                assert tokens_of(answer) == models.answer(name, prompt)


def test_a_prefill_whose_time_is_up(nixl: Deployment, models: Models, launch: Launcher) -> None:
    (hasty,) = launch(nixl_server(models.base, "base", producer=True, lease_s=SHORTEST_LEASE_S))
    prompt = prompt_of(models, 50, seed=120)
    ticket = prefill(hasty, prompt)
    time.sleep(SHORTEST_LEASE_S + 2)
    assert complete(nixl.decoders["bob"], "bob", prompt, ticket).status_code == FAILED
    hasty.stop()


def test_another_prompt_of_the_same_length(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 50, seed=130)
    other = [*prompt[:20], prompt[20] + 1, *prompt[21:]]
    ticket = prefill(nixl.base, prompt)
    assert complete(nixl.decoders["bob"], "bob", other, ticket).status_code == FAILED
    # The refused one has not used it up.
    found = tokens_of(complete(nixl.decoders["bob"], "bob", prompt, ticket))
    assert found == models.answer("bob", prompt)


def test_other_blocks_than_those_of_the_prefill(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 50, seed=140)
    ticket = prefill(nixl.base, prompt)
    other = prefill(nixl.base, prompt_of(models, 50, seed=141))
    mixed = ticket | {"remote_block_ids": other["remote_block_ids"]}
    assert complete(nixl.decoders["bob"], "bob", prompt, mixed).status_code == FAILED


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kv_transfer_params": ASK},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"n": 2},
        {"prompt_logprobs": 1},
    ],
)
def test_an_unguarded_decoder_prefills_nothing(
    nixl: Deployment, models: Models, values: dict[str, Any]
) -> None:
    bob = nixl.decoders["bob"]
    prompt = prompt_of(models, 50, seed=150)
    ticket = None
    if values and "kv_transfer_params" not in values:
        ticket = prefill(nixl.base, prompt)
    assert complete(bob, "bob", prompt, ticket, **values).status_code == FAILED
    assert nixl.answer("bob", prompt) == models.answer("bob", prompt)


def test_a_decoder_that_runs_out_of_room_fails_what_it_would_recompute(
    nixl: Deployment, models: Models, launch: Launcher
) -> None:
    blocks = ("--num-gpu-blocks-override", "14", "--max-num-seqs", "4")
    options = nixl_server(
        models.folders["ada"], "ada", models=models, extra=blocks, max_model_len=320
    )
    (tight,) = launch(options)
    prompts = [prompt_of(models, 100, seed=160 + index) for index in range(2)]
    tokens = 180

    def run(prompt: list[int]) -> list[int] | None:
        ticket = prefill(nixl.base, prompt)
        try:
            new = stream(tight, "ada", prompt, ticket, max_tokens=tokens)
            return [token for some in new for token in some]
        except RuntimeError:
            return None

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, prompts))
    assert None in found  # 2 x 280 tokens do not fit 13 blocks of 32
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer is None or answer == models.answer("ada", prompt, tokens=tokens)


def test_a_decoder_that_does_not_fit_does_not_start(
    models: Models, launch: Launcher, tmp_path: Path
) -> None:
    def changed(**values: Any) -> Path:
        folder = tmp_path / "-".join(values)
        folder.mkdir()
        for file in models.folders["ada"].iterdir():
            (folder / file.name).symlink_to(file)
        contract = Contract.load(models.folders["ada"])
        dataclasses.replace(contract, **values).save(folder)
        return folder

    dummy = ("--load-format", "dummy")
    wrong = {
        "base fingerprint": nixl_server(
            changed(base_fingerprint="sha256:" + "0" * 64), "other-base", models=models, extra=dummy
        ),
        "boundary rule": nixl_server(
            changed(boundary="generation_prompt"), "other-rule", models=models, extra=dummy
        ),
        "is this the base's folder": nixl_server(
            models.base, "same-path", models=models, extra=dummy
        ),
        "prefix caching is on": nixl_server(
            models.folders["ada"], "caching", models=models, extra=dummy, prefix_caching=True
        ),
        "only the base may prefill": nixl_server(
            models.folders["ada"], "producer", producer=True, extra=dummy
        ),
    }
    instances = launch(*wrong.values(), ready=False)
    for instance, message in zip(instances, wrong, strict=True):
        assert message in why_it_ended(instance)


def test_a_base_whose_side_channel_is_taken_does_not_start(
    models: Models, launch: Launcher
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = nixl_server(
            models.base, "taken", producer=True, nixl_port=port, extra=("--load-format", "dummy")
        )
        (base,) = launch(options, ready=False)
        assert f"side channel cannot be opened on 127.0.0.1:{port}" in why_it_ended(base)


def why_it_ended(instance: Instance) -> str:
    """The log of a server that ends in place of becoming ready."""
    with pytest.raises(InstanceError):
        wait_until_ready([instance], timeout_s=READY_S)
    log = instance.log.read_text()
    instance.stop()
    return log
