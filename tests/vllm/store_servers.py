"""What the store's tests share: their servers, and requests by token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from tests.vllm.conftest import server
from tests.vllm.models import TOKENS

from prefillshare_train.engines.vllm.instance import Instance, InstanceOptions

BLOCK = 32


def store_server(
    model: Path | str,
    name: str,
    store: Path,
    *,
    role: str,
    options: dict[str, Any] | None = None,
    **values: Any,
) -> InstanceOptions:
    """A server with the store connector."""
    transfer = {
        "kv_connector": "PrefillShareStoreConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"path": str(store), "budget_gib": 1, **(options or {})},
    }
    return server(model, name, kv_transfer=transfer, **values)


def post(instance: Instance, model: str, prompt: Sequence[int], **values: Any) -> httpx.Response:
    """A greedy completion of exactly so many tokens."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **values,
    }
    return httpx.post(f"{instance.url}/v1/completions", json=body, timeout=240, trust_env=False)


def complete(instance: Instance, model: str, prompt: Sequence[int], **values: Any) -> list[int]:
    """Token ids of the answer."""
    answer = post(instance, model, prompt, **values)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def prefill(instance: Instance, prompt: Sequence[int], **values: Any) -> None:
    """Have the base prefill a prompt."""
    complete(instance, "base", prompt, max_tokens=1, **values)


def assert_refused(answer: httpx.Response) -> None:
    """The request ended in an error and no text of the decoder came with it."""
    assert answer.status_code >= 400, answer.text
    assert "choices" not in answer.json()


def together(calls: Iterable[Any]) -> list[Any]:
    """Run calls without arguments at once; their results in order."""
    waiting = list(calls)
    with ThreadPoolExecutor(len(waiting)) as pool:
        return [future.result() for future in [pool.submit(call) for call in waiting]]


def count(instance: Instance, name: str) -> float:
    """A counter of the server's /metrics."""
    text = httpx.get(f"{instance.url}/metrics", timeout=30, trust_env=False).text
    found = [line for line in text.splitlines() if line.startswith(f"{name}_total{{")]
    assert found, f"/metrics has no {name}"
    return sum(float(line.split()[-1]) for line in found)


def stored(instance: Instance, name: str) -> float:
    """A counter of the store connector."""
    return count(instance, f"prefillshare_store_{name}")
