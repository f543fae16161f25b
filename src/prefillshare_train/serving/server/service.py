"""What all routes share: the engine, its limits, and how a body becomes requests of the engine."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.registry import Collector
from starlette.requests import Request

from prefillshare_train.serving.api import (
    EngineClient,
    EngineStoppedError,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from prefillshare_train.serving.server.config import ServerConfig
from prefillshare_train.serving.server.errors import ApiError
from prefillshare_train.serving.server.logprobs import TokenTexts
from prefillshare_train.serving.server.metrics import ServerMetrics
from prefillshare_train.serving.server.prompts import Prompt, PromptMaker
from prefillshare_train.serving.server.requests import SamplingFields
from prefillshare_train.serving.server.running import RunningResponses

_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Answering:
    """An accepted request.

    Attributes:
        id: of the answer.
        created: seconds since the epoch.
        choices_per_prompt: `n`.
        running: its responses, not yet submitted.
    """

    id: str
    created: int
    choices_per_prompt: int
    running: RunningResponses


class Service:
    """The engine and what is needed around it.

    Attributes:
        engine: answers.
        config: limits.
        metrics: of all answers.
        prompts: makes prompts.
        token_texts: texts of single tokens.
        started: when, in seconds since the epoch.
        accepting: False from the moment the server drains.
    """

    def __init__(
        self, engine: EngineClient, config: ServerConfig, metrics: Sequence[Collector] = ()
    ) -> None:
        self.engine = engine
        self.config = config
        self.metrics = ServerMetrics(engine.decoders, engine.stats, metrics)
        self.prompts = PromptMaker(engine.renderer, config.max_rendering)
        self.token_texts = TokenTexts(engine.renderer)
        self.started = int(time.time())
        self.accepting = True

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.engine.max_prompt_tokens + 1

    def admit(self, body: SamplingFields) -> None:
        """Refuse what can be refused before the prompt is rendered.

        Raises:
            EngineStoppedError: the server drains.
            ApiError: the decoder is unknown, too many responses are asked for, or fields do not go
                together.
        """
        if not self.accepting:
            raise EngineStoppedError("the server is stopping")
        if body.model not in self.engine.decoders:
            known = ", ".join(self.engine.decoders)
            message = f"there is no decoder {body.model!r}; there are {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        count = (body.n or 1) * body.prompt_count
        if count > self.config.max_n:
            message = f"{count} responses were asked for; at most {self.config.max_n}"
            raise ApiError(400, message, param="n")
        if body.end_session and body.session_id is None:
            raise ApiError(400, "end_session needs a session_id", param="end_session")
        if body.stream_options is not None and not body.stream:
            message = "stream_options is only for streams"
            raise ApiError(400, message, param="stream_options")

    def accept(
        self,
        body: SamplingFields,
        prompts: Sequence[Prompt],
        *,
        prefix: str,
        prompt_field: str,
        max_tokens: int | None,
        default_tokens: int | None,
        logprobs: int | None,
    ) -> Answering:
        """Turn a body and its prompts into requests, one a choice.

        Args:
            prefix: of the answer's id.
            prompt_field: field to name where the prompt is too long.
            max_tokens: of each response, where the body says so.
            default_tokens: otherwise; None for as many as fit.
            logprobs: as in `SamplingParams`.

        Raises:
            ApiError: a limit is passed; the message names it.
        """
        count = body.n or 1
        answer_id = f"{prefix}-{uuid.uuid4().hex}"
        requests: list[GenerationRequest] = []
        for number, prompt in enumerate(prompts):
            tokens = self._response_tokens(prompt, prompt_field, max_tokens, default_tokens)
            for choice in range(count):
                last = number == len(prompts) - 1 and choice == count - 1
                requests.append(
                    GenerationRequest(
                        decoder=body.model,
                        prompt_ids=prompt.ids,
                        sampling=_sampling(body, choice, tokens, logprobs),
                        header_length=prompt.header_length,
                        session=body.session_id,
                        end_session=bool(body.end_session) and last,
                        cache_salt=body.cache_salt,
                        request_id=f"{answer_id}-{len(requests)}",
                    )
                )
        running = RunningResponses(self.engine, self.metrics, requests)
        return Answering(answer_id, int(time.time()), count, running)

    async def collect(self, answering: Answering, request: Request) -> list[Generation]:
        """All responses, whole.

        Raises:
            ClientGoneError: the client did not wait for them; they are cancelled.
        """
        with answering.running as running:
            return await running.while_connected(request.receive, running.collect())

    def _response_tokens(
        self, prompt: Prompt, field: str, asked: int | None, default: int | None
    ) -> int:
        length = len(prompt.ids)
        longest = min(
            self.engine.max_prompt_tokens,
            self.config.max_prompt_tokens or self.engine.max_prompt_tokens,
        )
        if length > longest:
            message = f"the prompt has {length} tokens; at most {longest} are served"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        room = self.context_length - length
        limit = self.config.max_tokens
        if asked is None:
            return min(room, limit, default or limit)
        if asked > limit:
            raise ApiError(400, f"max_tokens is {asked}; at most {limit}", param="max_tokens")
        if asked > room:
            message = (
                f"max_tokens is {asked} and the prompt has {length} tokens; "
                f"together at most {self.context_length}"
            )
            raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
        return asked


def _sampling(
    body: SamplingFields, choice: int, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=None if body.seed is None else (body.seed + choice) % _SEEDS,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
