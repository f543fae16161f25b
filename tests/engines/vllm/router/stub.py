"""Stand-ins for vLLM instances: they speak its protocol, answer from a script, and can go wrong.

What a prefill leaves is kept in a `Ledger` that all stand-ins share, so that a decode is only
answered where a prefill of the very same token ids left a ticket (NIXL) or blocks (store).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from tests.serving.server.fake_engine import renderer

BASE = "base"
Script = Callable[[dict[str, Any]], str]
_KEEP_ALIVE_S = 5
"""vLLM's own."""


@dataclass
class Ledger:
    """What prefills have left."""

    tickets: dict[str, list[int]] = field(default_factory=dict)
    store: list[list[int]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)


class Stub:
    """One instance.

    Args:
        names: that it serves.
        script: text of a response to a body.
        delay_s: before each token.

    Attributes:
        calls: bodies of completions that came in.
        ids: their `X-Request-Id`.
        faults: what to do to the next calls: a status to answer, `hang` before an answer, `break`
            after the first token, `break early` before it, `error event`, `no end`, `garbage`.
        aborted: calls whose client went away.
        key: API key that it asks for.
    """

    def __init__(
        self,
        ledger: Ledger,
        names: tuple[str, ...],
        *,
        handover: str = "nixl",
        script: Script | str = "It is 4.",
        delay_s: float = 0.0,
        cached: int = 0,
    ) -> None:
        self.ledger = ledger
        self.names = names
        self.handover = handover
        self.script: Script = (lambda _: script) if isinstance(script, str) else script
        self.delay_s = delay_s
        self.cached = cached
        self.shared_tokens: int | None = None
        self.key: str | None = None
        self.healthy = True
        self.calls: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.faults: deque[str | int] = deque()
        self.aborted = 0
        self.started_at = 0.0
        self.port = 0
        self._renderer = renderer()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Stub:
        """Serve; after a `kill` on the same port, as a new process."""
        self.started_at = time.time()
        settings = uvicorn.Config(
            self._app(),
            port=self.port,
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            lifespan="off",
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the stand-in did not start"
            time.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def kill(self) -> None:
        """End at once, in the middle of whatever runs."""
        if self._server is None or self._thread is None:
            return
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(5)
        self._server = None

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response(status_code=200 if self.healthy else 503)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            data = [{"id": name, "object": "model", "max_model_len": 2048} for name in self.names]
            return JSONResponse({"object": "list", "data": data})

        @app.get("/metrics")
        async def metrics() -> Response:
            text = (
                "# TYPE process_start_time_seconds gauge\n"
                f"process_start_time_seconds {self.started_at}\n"
                "# TYPE vllm:cache_config_info gauge\n"
                'vllm:cache_config_info{block_size="16",num_gpu_blocks="320"} 1.0\n'
            )
            return Response(text, media_type="text/plain")

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.calls.append(body)
            self.ids.append(request.headers["x-request-id"])
            fault = self.faults.popleft() if self.faults else None
            if isinstance(fault, int):
                error = {"message": f"told to answer {fault}", "code": fault}
                return JSONResponse({"error": error}, fault)
            if fault == "garbage":
                return JSONResponse({"hello": "there"})
            if fault == "hang":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.005)
                self.aborted += 1
                return Response()
            if body["model"] not in self.names:
                return JSONResponse({"error": {"message": "no such model"}}, 404)
            if body["model"] == BASE:
                return self._prefill(body)
            if not self._has_prefix(body):
                return JSONResponse({"error": {"message": "no K/V of the base"}}, 500)
            return StreamingResponse(self._tokens(body, fault), media_type="text/event-stream")

        return app

    def _prefill(self, body: dict[str, Any]) -> Response:
        assert body["max_tokens"] == 1
        answer: dict[str, Any] = {
            "choices": [{"index": 0, "text": "x", "finish_reason": "length"}],
            "usage": {
                "prompt_tokens": len(body["prompt"]),
                "prompt_tokens_details": {"cached_tokens": self.cached},
            },
        }
        if self.handover == "store":
            self.ledger.store.append(body["prompt"])
        else:
            assert body["kv_transfer_params"]["do_remote_decode"] is True
            ticket = f"ticket-{next(self.ledger.numbers)}"
            self.ledger.tickets[ticket] = body["prompt"]
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "remote_block_ids": [ticket],
                "remote_prefill_cached_tokens": self.cached,
            }
        return JSONResponse(answer)

    def _has_prefix(self, body: dict[str, Any]) -> bool:
        if self.handover == "store":
            return body["prompt"] in self.ledger.store
        params = body.get("kv_transfer_params") or {}
        if "remote_prefill_cached_tokens" in params:
            self.ledger.violations.append("vLLM would tell the base's hits as the decoder's")
        for ticket in params.get("remote_block_ids") or []:
            prompt = self.ledger.tickets.pop(ticket, None)
            if prompt is None:
                self.ledger.violations.append(f"{ticket} was used twice")
            elif prompt != body["prompt"]:
                self.ledger.violations.append("base and decoder got different tokens")
            else:
                return True
        return False

    async def _tokens(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[str]:
        text = self.script(body)
        ends = [text.index(stop) for stop in body["stop"] if stop in text]
        ids = self._renderer.encode([text[: min(ends, default=len(text))]])[0]
        reason = "stop"
        if len(ids) >= body["max_tokens"]:
            ids, reason = ids[: body["max_tokens"]], "length"
        complete = False
        try:
            if fault == "error event":
                yield _event({"error": {"message": "KV load failed", "code": 500}})
                return
            if fault == "break early":
                raise ConnectionError
            for place, token in enumerate(ids):
                await asyncio.sleep(self.delay_s)
                last = place == len(ids) - 1 and fault != "no end"
                yield _event(self._chunk(body, token, reason if last else None))
                if fault == "break":
                    raise ConnectionError
            details = {}
            if self.shared_tokens is not None:
                details = {"prompt_tokens_details": {"cached_tokens": self.shared_tokens}}
            yield _event({"choices": [], "usage": {"prompt_tokens": 1, **details}})
            yield "data: [DONE]\n\n"
            complete = True
        finally:
            if not complete and fault is None:
                self.aborted += 1

    def _chunk(self, body: dict[str, Any], token: int, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._renderer.decode([token]),
            "token_ids": [token],
            "finish_reason": reason,
            "stop_reason": None,
            "logprobs": None,
        }
        if (count := body.get("logprobs")) is not None:
            assert body["return_tokens_as_token_ids"] is True
            # The chosen token comes first and is one of them here, as vLLM has it.
            top = {f"token_id:{token + place}": -0.5 - place for place in range(max(1, count))}
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}"],
                "token_logprobs": [-0.5],
                "top_logprobs": [top],
                "text_offset": [0],
            }
        return {"object": "text_completion", "choices": [choice]}


def _event(data: dict[str, Any]) -> str:
    # As vLLM has it: what ends a line of text, though not one of the stream, stays as it is.
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
