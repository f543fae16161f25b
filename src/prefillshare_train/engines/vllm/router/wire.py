"""vLLM's completions protocol: the bodies that go there, and the chunks that come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefillshare_train.engines.vllm.router.config import Handover
from prefillshare_train.serving.api import GenerationRequest, TokenLogprob

_ASK_FOR_TICKET = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_TOKEN_ID = "token_id:"

Ticket = Mapping[str, Any]
"""`kv_transfer_params` of a prefill: good for one decode, since the base then frees the blocks."""


class WireError(ValueError):
    """An instance answered something that is not vLLM's protocol."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a prefill left.

    Attributes:
        ticket: for the decode; None on the store route.
        cached_tokens: prompt tokens that the base had kept; None where the instance does not tell
            (it does with `--enable-prompt-tokens-details`).
    """

    ticket: Ticket | None
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk of a decode.

    Attributes:
        token_ids, text, logprobs: what is new.
        finish_reason: as vLLM calls it, in the last chunk that has tokens.
        stop_reason: the stop string or token id.
        shared_tokens: in a chunk of its own after that: prompt tokens whose K/V the decoder was
            given; None where the instance does not tell.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    shared_tokens: int | None = None


def prefill_body(request: GenerationRequest, base_model: str, handover: Handover) -> dict[str, Any]:
    """The one call to the base: the very token ids that the decoder gets, and one token."""
    body: dict[str, Any] = {
        "model": base_model,
        "prompt": list(request.prompt_ids),
        "max_tokens": 1,
        "temperature": 0,
        # So that it always ends by its length: other ends need not hand anything over.
        "ignore_eos": True,
    }
    if request.cache_salt is not None:
        body["cache_salt"] = request.cache_salt
    if handover == "nixl":
        body["kv_transfer_params"] = dict(_ASK_FOR_TICKET)
    return body


def decode_body(
    request: GenerationRequest, model: str, end_token_ids: Sequence[int], ticket: Ticket | None
) -> dict[str, Any]:
    """The call to the decoder.

    Every sampling value is written out, because an instance would fill gaps from the model's
    generation configuration.

    Args:
        end_token_ids: tokens that end a response, as the decoder was trained.
    """
    sampling = request.sampling
    ends = () if sampling.ignore_eos else end_token_ids
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": list(dict.fromkeys((*sampling.stop_token_ids, *ends))),
        "ignore_eos": sampling.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if request.cache_salt is not None:
        body["cache_salt"] = request.cache_salt
    if ticket is not None:
        # vLLM would pass the base's own hits off as the prompt tokens that the decoder got.
        body["kv_transfer_params"] = {
            key: value for key, value in ticket.items() if key != "remote_prefill_cached_tokens"
        }
    return body


def read_prefilled(answer: Any, handover: Handover) -> Prefilled:
    """The answer to a prefill.

    Raises:
        WireError: it is none, or brings no ticket on the NIXL route.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise WireError("its answer is not a completion")
    ticket = answer.get("kv_transfer_params") if handover == "nixl" else None
    if handover == "nixl" and not (isinstance(ticket, dict) and ticket):
        raise WireError(
            "its answer brings no kv_transfer_params: the instance must be started with a NIXL "
            "connector as producer"
        )
    return Prefilled(ticket, _cached_tokens(answer.get("usage")))


def read_piece(chunk: Any, logprobs: int | None) -> Piece | None:
    """One chunk of a stream; None where it brings nothing.

    Args:
        logprobs: alternatives that were asked for.

    Raises:
        WireError: it is no chunk.
    """
    try:
        if not chunk["choices"]:
            shared = _cached_tokens(chunk.get("usage"))
            return None if shared is None else Piece(shared_tokens=shared)
        choice = chunk["choices"][0]
        token_ids = tuple(choice["token_ids"])
        if not all(type(token) is int for token in token_ids):
            raise TypeError
        entries: tuple[TokenLogprob, ...] = ()
        if logprobs is not None and token_ids:
            entries = _logprobs(choice["logprobs"], token_ids, logprobs)
        return Piece(
            token_ids,
            str(choice["text"]),
            entries,
            choice.get("finish_reason"),
            choice.get("stop_reason"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise WireError("a chunk of its stream is not vLLM's (version 0.32 is tested)") from error


def error_message(answer: Any) -> str | None:
    """The message of an error in vLLM's or OpenAI's form; None where it is none."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error", answer if answer.get("object") == "error" else None)
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return None if error is None else str(error)


def _cached_tokens(usage: Any) -> int | None:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else None


def _logprobs(
    given: Mapping[str, Any], token_ids: Sequence[int], count: int
) -> tuple[TokenLogprob, ...]:
    entries = []
    for token, chosen, top in zip(
        token_ids, given["token_logprobs"], given["top_logprobs"], strict=True
    ):
        # vLLM adds the chosen token where it is not among the likeliest.
        likeliest = sorted(top.items(), key=lambda item: -item[1])[:count]
        alternatives = tuple(
            (int(name.removeprefix(_TOKEN_ID)), float(value)) for name, value in likeliest
        )
        entries.append(TokenLogprob(token, float(chosen), alternatives))
    return tuple(entries)
