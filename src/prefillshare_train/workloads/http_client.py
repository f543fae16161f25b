"""Any OpenAI-compatible endpoint as the receiver of a load."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from prefillshare_train.serving.api import EngineStats
from prefillshare_train.serving.event_stream import event_data
from prefillshare_train.workloads.client import Call, OverloadedError, Reply

Api = Literal["completions", "chat"]
_RETRY_STATUS = (429, 503)


class HttpClient:
    """Streams responses from `/v1/completions` or `/v1/chat/completions`.

    `completions` sends prompts as token ids. `chat` sends a trace's messages as they are, and any
    other prompt as the text of one user message.

    `ignore_eos` is an extension that vLLM, SGLang and `prefillshare serve` know; it makes lengths
    the same everywhere, and a response that ends earlier all the same is an error. `cache_salt` is
    known to vLLM and `prefillshare serve`, `session_id` and `end_session` to the latter alone.

    Args:
        url: up to and without `/v1`.
        decode: token ids to text, for `chat`.
        encode: text to token ids, for sessions whose context grows by what was generated.
        api_key: sent as a bearer token.
        timeout_s: longest silence of the server.
        extensions: send the fields above, which are not OpenAI's and some servers refuse.
        cache_salt: sent with every call, so that it finds nothing in the server's cache but what
            this client has sent; only with `extensions`.
        transport: of httpx, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api: Api = "completions",
        decode: Callable[[Sequence[int]], str] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        extensions: bool = True,
        cache_salt: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._api = api
        self._decode = decode
        self._encode = encode
        self._extensions = extensions
        self._cache_salt = cache_salt
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s),
            # The load driver caps sessions; a pool's own limit would be a second, hidden queue.
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    @property
    def max_prompt_tokens(self) -> int | None:
        """Not to be had over HTTP."""
        return None

    async def generate(self, call: Call) -> Reply:
        """See `Client`."""
        chat = self._api == "chat" or call.messages is not None
        path = "/v1/chat/completions" if chat else "/v1/completions"
        start = time.perf_counter()
        texts: list[str] = []
        first: float | None = None
        last = start
        usage: dict[str, Any] = {}
        error: str | None = None
        ends: list[str] = []
        try:
            async with self._http.stream("POST", path, json=self._body(call, chat)) as response:
                if response.status_code in _RETRY_STATUS:
                    raise OverloadedError(f"HTTP {response.status_code}", _retry_after(response))
                if response.status_code != httpx.codes.OK:
                    content = (await response.aread()).decode(errors="replace")
                    error = f"HTTP {response.status_code}: {content[:500]}"
                else:
                    async for chunk in _chunks(response, ends):
                        error = error or _error_of(chunk)
                        usage = chunk.get("usage") or usage
                        text = _text_of(chunk)
                        if text is None:
                            continue
                        last = time.perf_counter()
                        first = last if first is None else first
                        if text:
                            texts.append(text)
        except (httpx.HTTPError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        text = "".join(texts)
        details = usage.get("prompt_tokens_details") or {}
        count = usage.get("completion_tokens", len(texts))
        error = error or self._incomplete(call, usage, count, bool(ends))
        end = time.perf_counter() if error else last
        return Reply(
            token_ids=tuple(self._encode(text)) if self._encode is not None else (),
            text=text,
            completion_tokens=count,
            ttft_s=None if first is None else first - start,
            total_s=end - start,
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            error=error,
        )

    async def end_session(self, session: str) -> None:
        """Servers end sessions by themselves, when nothing comes any more."""

    def stats(self) -> EngineStats | None:
        """Not to be had over HTTP."""
        return None

    def _incomplete(
        self, call: Call, usage: dict[str, Any], count: int, finished: bool
    ) -> str | None:
        """Why what came is no whole response; None where it is."""
        if not finished:
            return f"the stream broke off after {count} tokens: no finish reason, no [DONE]"
        if not count:
            return "the response is empty"
        # Chunks may hold several tokens: without a usage their number says nothing.
        if self._extensions and usage and count < call.max_tokens:
            return (
                f"the response has {count} of {call.max_tokens} tokens: the server does not know "
                "ignore_eos. Measure it with --no-extensions, at the lengths that it chooses"
            )
        return None

    def _body(self, call: Call, chat: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": call.decoder,
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._extensions:
            body |= {"ignore_eos": True, "session_id": call.session, "end_session": call.last}
            if self._cache_salt is not None:
                body["cache_salt"] = self._cache_salt
        if not chat:
            body["prompt"] = list(call.prompt_ids)
        elif call.messages is not None:
            body["messages"] = [dict(message) for message in call.messages]
        else:
            if self._decode is None:
                raise ValueError("chat needs `decode` for prompts that are token ids")
            body["messages"] = [{"role": "user", "content": self._decode(call.prompt_ids)}]
        return body


def _text_of(chunk: dict[str, Any]) -> str | None:
    """New text of a chunk, which tokens may lack; None where it tells no time (a role, the usage).

    A special token has no text, nor has one whose text is held back, and either took its time.
    """
    for choice in chunk.get("choices", ()):
        if "text" in choice:
            return str(choice["text"])
        delta = choice.get("delta") or {}
        brings = {name for name, value in delta.items() if value}
        if brings != {"role"} or choice.get("finish_reason"):
            return str(delta.get("content") or "")
    return None


async def _chunks(response: httpx.Response, ends: list[str]) -> AsyncIterator[dict[str, Any]]:
    """The events; `ends` gets every sign that the response is whole."""
    async for data in event_data(response.aiter_bytes(), partial(ends.append, "[DONE]")):
        chunk = json.loads(data)
        reasons = (choice.get("finish_reason") for choice in chunk.get("choices", ()))
        ends.extend(reason for reason in reasons if reason)
        yield chunk


def _error_of(chunk: dict[str, Any]) -> str | None:
    error = chunk.get("error")
    return None if error is None else str(error.get("message", error))


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:  # a date: servers of models do not send one
        return 1.0
