"""Requests to servers, as a router makes them: token ids in, token ids out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tests.vllm.models import TOKENS

from prefillshare_train.engines.vllm.instance import Instance

_TIMEOUT_S = 300
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Deployment:
    """A base's server and its decoders'."""

    base: Instance
    decoders: dict[str, Instance]

    def answer(self, name: str, prompt: Sequence[int], **values: Any) -> list[int]:
        """Prefill at the base and decode, as one, while the other decoders stand still."""
        with self._alone(name):
            ticket = prefill(self.base, prompt)
            return tokens_of(complete(self.decoders[name], name, prompt, ticket, **values))

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Stop the processes of other decoders meanwhile: idle ones never rest, on few cores."""
        others = [one.pid for key, one in self.decoders.items() if key != name]
        groups = [pid for pid in others if pid is not None]
        for group in groups:
            os.killpg(group, signal.SIGSTOP)
        try:
            yield
        finally:
            for group in groups:
                os.killpg(group, signal.SIGCONT)


def body_of(model: str, prompt: Any, ticket: Any = None, **values: Any) -> dict[str, Any]:
    """A greedy completion that only its length ends."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if ticket is not None:
        body["kv_transfer_params"] = ticket
    return body | values


def complete(
    instance: Instance, model: str, prompt: Any, ticket: Any = None, **values: Any
) -> httpx.Response:
    """One completion, whatever comes of it."""
    return httpx.post(
        f"{instance.url}/v1/completions",
        json=body_of(model, prompt, ticket, **values),
        timeout=_TIMEOUT_S,
        trust_env=False,
    )


def tokens_of(response: httpx.Response) -> list[int]:
    """The token ids of an answer that must have come."""
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"], response.text
    return list(choices[0]["token_ids"])


def prefill(base: Instance, prompt: Sequence[int], **values: Any) -> dict[str, Any]:
    """Prefill at the base; the ticket of the NIXL route."""
    response = complete(base, "base", prompt, ASK, **({"max_tokens": 1} | values))
    assert response.status_code == 200, response.text
    ticket = response.json()["kv_transfer_params"]
    assert ticket["do_remote_prefill"] is True
    return dict(ticket)


def stream(
    instance: Instance, model: str, prompt: Sequence[int], ticket: Any, **values: Any
) -> Iterator[list[int]]:
    """Token ids as they come; closing it ends the request."""
    body = body_of(model, prompt, ticket, stream=True, **values)
    with (
        httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", f"{instance.url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                yield chunk["choices"][0]["token_ids"]


def metric(instance: Instance, name: str) -> float:
    """The sum of a metric's samples."""
    text = httpx.get(f"{instance.url}/metrics", timeout=30, trust_env=False).text
    samples = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    assert samples, f"no metric {name}"
    return sum(float(line.rpartition(" ")[2]) for line in samples)
