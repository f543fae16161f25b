"""The router over real vLLM servers: OpenAI's client gets what `core.generate` answers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.vllm.calls import Deployment
from tests.vllm.conftest import READY_S, Launcher, core, nixl_server, prompt_of
from tests.vllm.models import FULL, LORA, TOKENS, Models
from tests.vllm.store_servers import store_server

from prefillshare_train.engines.vllm.instance import Instance
from prefillshare_train.engines.vllm.router.backend import VllmBackend
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.prompts import Prompting
from prefillshare_train.engines.vllm.router.run import make_router

BLOCK = 32
LONGEST = 4000
"""Tokens of an answer that does not end by itself while a test acts; the router allows 4,096."""
MESSAGES: list[Any] = [{"role": "user", "content": "Name three things that a harbour needs."}]


@dataclass
class Routed:
    """A router in this process, and the servers behind it."""

    backend: VllmBackend
    client: openai.OpenAI
    url: str
    prefill: list[Instance]

    def complete(self, model: str, prompt: list[int], **more: Any) -> list[str]:
        """The answer's tokens, as text."""
        answer = self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, **more},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        return list(logprobs.tokens or [])


@contextlib.contextmanager
def routed(models: Models, prefill: list[Instance], **options: Any) -> Iterator[Routed]:
    """Route to servers that are ready."""
    config = RouterConfig.parse(
        {
            "prefill": [one.url for one in prefill],
            "base": str(models.base),
            "block_tokens": BLOCK,
            "health_timeout_s": 20.0,
            **options,
        }
    )
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with VllmBackend(config, Prompting.load(config)) as backend:
        router = make_router(backend)
        thread = threading.Thread(target=router.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        wait_for(lambda: router.started)
        wait_for(lambda: all(one.up for one in backend.fleet.replicas.values()), READY_S)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            yield Routed(backend, client, url, prefill)
        router.should_exit = True
        thread.join(10)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.1)


def texts(models: Models, answer: list[int]) -> list[str]:
    return [models.tokenizer.decode([token]) for token in answer]


def metric(url: str, name: str, **labels: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.fixture(scope="module")
def one_process(
    models: Models, launch: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Routed]:
    adapters = {name: str(models.folders[name]) for name in LORA}
    options = store_server(
        models.base,
        "base",
        tmp_path_factory.mktemp("store"),
        role="kv_both",
        options={"base_fingerprint": models.base_fingerprint, "decoders": adapters},
        lora=adapters,
        cores=core(0),
        max_model_len=LONGEST + 200,
    )
    instances = launch(options)
    decoders: dict[str, Any] = {name: {} for name in adapters}
    with routed(models, instances, handover="store", decoders=decoders) as made:
        yield made


@pytest.fixture(scope="module")
def over_nixl(models: Models, nixl: Deployment) -> Iterator[Routed]:
    with routed(models, [nixl.base], handover="nixl", decoders=pools(nixl)) as made:
        yield made


def pools(nixl: Deployment) -> dict[str, Any]:
    return {name: {"replicas": [one.url]} for name, one in nixl.decoders.items()}


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 100])
def test_adapters_in_one_process(models: Models, one_process: Routed, length: int) -> None:
    for name in LORA:
        prompt = prompt_of(models, length, seed=1)
        assert one_process.complete(name, prompt) == texts(models, models.answer(name, prompt))
    assert metric(one_process.url, "prefillshare_router_unshared_tokens_total") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_rendered_once_and_answered_alike(
    models: Models, one_process: Routed, stream: bool
) -> None:
    prompt = one_process.backend.renderer.prompt_ids(MESSAGES)
    wanted = models.tokenizer.decode(models.answer("lora-ada", prompt), skip_special_tokens=True)
    options: dict[str, Any] = {
        "model": "lora-ada",
        "messages": MESSAGES,
        "max_tokens": TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    if stream:
        chunks = one_process.client.chat.completions.create(stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        answer = one_process.client.chat.completions.create(**options)
        text = answer.choices[0].message.content or ""
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
    assert text == wanted


def test_log_probabilities_are_of_the_raw_logits(models: Models, one_process: Routed) -> None:
    answer = one_process.client.chat.completions.create(
        model="lora-ada",
        messages=MESSAGES,
        max_tokens=2,
        temperature=0.5,
        seed=3,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for entry in logprobs.content or []:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0]


def test_an_aborted_stream_ends_at_the_instance(one_process: Routed) -> None:
    instance, most = one_process.prefill[0].url, LONGEST
    before = metric(instance, "vllm:generation_tokens_total")
    with one_process.client.chat.completions.create(
        model="lora-bob",
        messages=MESSAGES,
        max_tokens=most,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        for _, _ in zip(stream, range(5), strict=False):
            pass
        assert metric(instance, "vllm:num_requests_running") == 1
    wait_for(lambda: metric(instance, "vllm:num_requests_running") == 0)
    assert metric(instance, "vllm:generation_tokens_total") - before < most
    wait_for(lambda: one_process.backend.stats().finished.get("cancelled") == 1)


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 100])
def test_full_decoders_over_nixl(models: Models, over_nixl: Routed, length: int) -> None:
    prompt = prompt_of(models, length, seed=2)
    for name in FULL:
        assert over_nixl.complete(name, prompt) == texts(models, models.answer(name, prompt))
    assert metric(over_nixl.url, "prefillshare_router_unshared_tokens_total") == 0


def test_concurrent_requests_over_nixl(models: Models, over_nixl: Routed) -> None:
    asked = [(FULL[n % 2], prompt_of(models, 40 + 13 * n, seed=n)) for n in range(6)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda job: over_nixl.complete(*job), asked))
    assert answers == [texts(models, models.answer(name, prompt)) for name, prompt in asked]


def test_a_killed_prefill_instance_over_nixl(
    models: Models, nixl: Deployment, launch: Launcher
) -> None:
    prompt = prompt_of(models, 70, seed=5)
    wanted = texts(models, models.answer("ada", prompt))
    (own,) = launch(nixl_server(models.base, "base", producer=True))
    bases = [own, nixl.base]
    with routed(models, bases, handover="nixl", decoders=pools(nixl)) as running:
        killed, other = running.backend.fleet.prefill
        other.draining = True
        assert running.complete("ada", prompt, session_id="s") == wanted
        other.draining = False
        assert own.pid is not None
        os.killpg(own.pid, signal.SIGKILL)
        # Affinity and kept prefix both send it to the one that is dead.
        assert running.complete("ada", prompt, session_id="s") == wanted
        assert not killed.up
        assert running.complete("ada", prompt, session_id="s") == wanted
