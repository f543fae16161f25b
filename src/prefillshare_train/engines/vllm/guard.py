"""ASGI middleware for decoders: refuses what they would prefill with their own weights.

    --middleware prefillshare_train.engines.vllm.guard.DecoderGuard    (route NIXL)
    --middleware prefillshare_train.engines.vllm.guard.StoreGuard      (route store, also with LoRA)

The connectors fail such requests by themselves, deep in the engine, with a status 500. The guard
says it at the door with a 409 that tells why. What it does not know it refuses: a later vLLM may
serve more that generates.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
    }
)
"""Routes whose requests can carry what a decoder needs."""
HARMLESS = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/ping",
        "/v1/completions/render",
        "/v1/chat/completions/render",
        "/v1/responses/render",
        "/v1/messages/render",
        "/v1/messages/count_tokens",
        "/v1/completions/derender",
        "/v1/chat/completions/derender",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/start_profile",
        "/stop_profile",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/sleep",
        "/wake_up",
        "/pause",
        "/resume",
    }
)
"""Other routes that change or generate nothing from a prompt."""
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_HANDED_OVER = (
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
)
_TYPE = "prefillshare_refused"


class StoreGuard:
    """Refuses what no decoder can answer from the base's K/V, whatever the route.

    Whether K/V are there only the store knows: its connector fails a request that misses.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "websocket":
            await _close(receive, send)
            return
        if scope["type"] != "http" or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        route = scope["path"].removeprefix(scope.get("root_path", ""))
        if route in HARMLESS:
            await self._app(scope, receive, send)
            return
        if route not in GENERATING:
            await _answer(send, 409, f"a decoder does not serve {scope['method']} {route}", None)
            return
        body = await _body(receive)
        if body is None:
            return  # the client has gone
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            await _answer(send, 400, f"the request is no JSON: {error}", None)
            return
        refusal = self.refusal(request)
        if refusal is not None:
            key, why = refusal
            await _answer(send, 409, f"{key}: {why}" if key else why, key or None)
            return
        await self._app(scope, _again(body, receive), send)

    def refusal(self, request: Any) -> tuple[str, str] | None:
        """Why a generating request is refused: the key at fault (or nothing), and the reason."""
        if not isinstance(request, dict):
            return "", "the request is no JSON object"
        sampling = request.get("sampling_params")
        for values in (request, sampling if isinstance(sampling, dict) else {}):
            for key in ("n", "best_of"):
                if values.get(key) not in (None, 1):
                    return key, "a prefill is good for one answer; send a request for each"
            for key in ("echo", "use_beam_search"):
                if values.get(key):
                    return key, "a decoder does not run the prompt, and answers once"
            if values.get("prompt_logprobs") is not None:
                return "prompt_logprobs", "the base's part of the prompt is not run by a decoder"
        prompt = request.get("prompt")
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            return "prompt", "a prefill is good for one prompt; send a request for each"
        if request.get("prompt_embeds"):
            return "prompt_embeds", "a decoder needs token ids, of which the base's K/V are made"
        return None


class DecoderGuard(StoreGuard):
    """Refuses besides what brings no K/V of the base along (route NIXL)."""

    def refusal(self, request: Any) -> tuple[str, str] | None:
        """As above; and a request without the `kv_transfer_params` of a prefill."""
        found = super().refusal(request)
        if found is not None:
            return found
        key = "kv_transfer_params"
        params = request.get(key)
        if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
            return (
                key,
                "this decoder answers from a base's K/V alone and would prefill this request with "
                "its own weights. Send it to the router, or prefill it at the base first and pass "
                "what that answers",
            )
        if params.get("do_remote_decode"):
            return f"{key}.do_remote_decode", "a decoder hands over nothing"
        for name in _HANDED_OVER:
            if not params.get(name):
                return f"{key}.{name}", f"is {params.get(name)!r}: pass what the prefill answered"
        return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body, in however many chunks it comes; None where the client goes first."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with a body that was read already."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _answer(send: Send, status: int, message: str, param: str | None) -> None:
    error = {"message": message, "type": _TYPE, "param": param, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": "not served by a decoder"})
