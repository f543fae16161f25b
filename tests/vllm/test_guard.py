"""The guard in front of a real decoder: vLLM's own routes, and what it says at the door."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.vllm.calls import Deployment, complete, prefill, tokens_of
from tests.vllm.conftest import prompt_of
from tests.vllm.models import Models

from prefillshare_train.engines.vllm.guard import GENERATING, HARMLESS


def _post(nixl: Deployment, path: str, body: Any) -> httpx.Response:
    url = nixl.decoders["ada"].url + path
    return httpx.post(url, json=body, timeout=60, trust_env=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"max_tokens": 4}}),
        ("/invocations", {"prompt": "Hello"}),
    ],
)
def test_a_request_without_a_prefill_is_refused(
    nixl: Deployment, path: str, body: dict[str, Any]
) -> None:
    response = _post(nixl, path, {"model": "ada", **body})
    assert response.status_code == 409
    assert response.json()["error"]["type"] == "prefillshare_refused"


def test_a_request_with_one_is_answered(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 40, seed=200)
    assert nixl.answer("ada", prompt) == models.answer("ada", prompt)


def test_a_refused_request_does_not_use_its_prefill_up(nixl: Deployment, models: Models) -> None:
    prompt = prompt_of(models, 40, seed=201)
    ticket = prefill(nixl.base, prompt)
    ada = nixl.decoders["ada"]
    assert complete(ada, "ada", prompt, ticket, n=2).status_code == 409
    assert tokens_of(complete(ada, "ada", prompt, ticket)) == models.answer("ada", prompt)


def test_every_route_that_takes_a_body_is_known_or_refused(nixl: Deployment) -> None:
    schema = httpx.get(nixl.decoders["ada"].url + "/openapi.json", trust_env=False).json()
    posts = {path for path, methods in schema["paths"].items() if "post" in methods}
    assert {"/v1/completions", "/v1/chat/completions"} <= posts
    for path in sorted(posts - HARMLESS - GENERATING):
        response = _post(nixl, path.replace("{response_id}", "x"), {"model": "ada"})
        assert response.status_code == 409, path


def test_what_generates_nothing_is_served(nixl: Deployment) -> None:
    ada = nixl.decoders["ada"]
    assert httpx.get(f"{ada.url}/v1/models", trust_env=False).status_code == 200
    assert _post(nixl, "/tokenize", {"model": "ada", "prompt": "Hello"}).json()["tokens"]
