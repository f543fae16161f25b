"""The server over the engine, on a tiny model: answers, sharing, and what is given back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.served import load_served
from tests.serving.server.serving import Served, serve, wait_for

from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine

NAMES = ("math", "tools", "full")
QUESTION = [{"role": "user", "content": "What is 2 + 2? Think, then answer."}]
GREEDY: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served(served_folder: Path) -> Iterator[Served]:
    config = EngineConfig(kv_bytes=8 << 20, block_tokens=4, chunk_tokens=64)
    with Engine(load_served(served_folder, NAMES), config) as engine, serve(engine) as running:
        yield running


def expected(served: Served, folder: Path, name: str, max_tokens: int) -> str:
    """What `core.generate` answers to the question."""
    renderer = served.engine.renderer
    text = renderer.text(QUESTION, add_generation_prompt=True)
    prompt = renderer.encode([text])[0]
    bare = renderer.text(QUESTION, add_generation_prompt=False)
    loaded = load_decoder(folder / name)
    header = renderer.header_length(bare, text, prompt)
    held = loaded.contract.rule.base_length(len(prompt), header)
    cache = loaded.prefill.prefill([prompt[:held]])
    stops = renderer.end_token_ids
    ids = generate(loaded.decoder, cache, [prompt], max_new_tokens=max_tokens, stop_ids=stops)[0]
    return renderer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_answers_equal_core_generate(served: Served, served_folder: Path, name: str) -> None:
    answer = served.chat(model=name, **GREEDY).json()["choices"][0]["message"]["content"]
    assert answer == expected(served, served_folder, name, 24)
    lines = served.chat(model=name, stream=True, **GREEDY).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == answer


def test_one_decoders_prompt_is_the_nexts_cache(served: Served) -> None:
    question = [{"role": "user", "content": "A context that nobody has asked about before."}]
    usages = [
        served.chat(model=name, **{**GREEDY, "messages": question}).json()["usage"]
        for name in ("math", "full")
    ]
    assert usages[0]["prefillshare"]["prefilled_tokens"] > 20
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached + usages[1]["prefillshare"]["prefilled_tokens"] < usages[1]["prompt_tokens"]
    assert usages[1]["prefillshare"]["prefilled_tokens"] < 8
    salted = served.chat(model="full", cache_salt="mine", **{**GREEDY, "messages": question})
    assert salted.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_choices_differ_and_seeds_repeat_them(served: Served) -> None:
    options = {**GREEDY, "temperature": 1.5, "n": 3, "seed": 5}
    first, second = (served.chat(**options).json()["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in second]


def test_logprobs_and_stop_strings(served: Served, served_folder: Path) -> None:
    whole = expected(served, served_folder, "math", 24)
    stop = whole[6:8]
    options = {**GREEDY, "stop": stop, "logprobs": True, "top_logprobs": 3}
    choice = served.chat(**options).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    for entry in choice["logprobs"]["content"]:
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert len(entry["top_logprobs"]) == 3


def test_a_prompt_of_token_ids_may_have_a_header(served: Served) -> None:
    ids = served.engine.renderer.prompt_ids(QUESTION)
    options = {"model": "tools", "temperature": 0, "max_tokens": 24}
    plain = served.complete(prompt=ids, **options).json()
    chat = served.chat(messages=QUESTION, **options).json()
    assert plain["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    none = served.complete(prompt=ids[:-1], **options)
    assert none.status_code == 400
    assert "header" in none.json()["error"]["message"]


def test_a_client_that_goes_away_gives_its_blocks_back(served: Served) -> None:
    body = (
        b'{"model": "full", "max_tokens": 200, "ignore_eos": true, '
        b'"messages": [{"role": "user", "content": "Go on."}]}'
    )
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(head.encode() + body)
        wait_for(lambda: served.engine.stats().blocks_used > 0)
    wait_for(lambda: served.engine.stats().blocks_used == 0, 3)
    assert served.engine.stats().finished["cancelled"] == 1


def test_the_command_serves_until_it_is_told_to_stop(served_folder: Path) -> None:
    arguments = ["--base", str(served_folder / "base"), "--port", "0", "--kv-gib", "0.01"]
    for name in NAMES:
        arguments += ["--decoder", f"{name}={served_folder / name}"]
    program = "from prefillshare_train.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PREFILLSHARE_API_KEY": "secret"},
    )
    try:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            found = re.search(r"running on (http://\S+)", line)
            if found:
                url = found[1]
                break
        assert url is not None
        headers = {"Authorization": "Bearer secret"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == list(NAMES)
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={"model": "tools", **GREEDY},
            headers=headers,
            timeout=30,
        )
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
