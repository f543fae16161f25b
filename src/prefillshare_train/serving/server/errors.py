"""Errors in OpenAI's form, whatever raised them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from prefillshare_train.serving.api import EngineStoppedError, QueueFullError, ServingError

_LOG = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_MAX_MESSAGE = 500
_MAX_PROBLEMS = 3


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: of HTTP.
        message: for people.
        param: the field at fault.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {
            "message": _cut(self.message),
            "type": kind,
            "param": None if self.param is None else _cut(self.param),
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """The answer."""
        # ASCII, because a message may quote half a surrogate pair, which UTF-8 cannot hold.
        return Response(
            json.dumps(self.body(), ensure_ascii=True),
            self.status,
            headers=self.headers,
            media_type="application/json",
        )


def as_api_error(error: Exception) -> ApiError:
    """The answer to what engine and renderer raise; 500 for what nobody expected."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": seconds})
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="stopping", headers={"Retry-After": "5"})
    if isinstance(error, ServingError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's form."""

    async def expected(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors(), error.body).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    for kind in (ApiError, QueueFullError, EngineStoppedError, ServingError):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _validation_error(problems: Sequence[Any], body: Any) -> ApiError:
    """Name the field that is wrong: of several findings the most deeply nested."""
    if not problems:
        return ApiError(400, "the request is not valid")
    named = [(_field(problem["loc"][1:], body), problem) for problem in problems]
    param = max(named, key=lambda item: len(item[1]["loc"]))[0]
    messages = dict.fromkeys(_message(problem) for field, problem in named if field == param)
    text = "; or ".join(list(messages)[:_MAX_PROBLEMS])
    return ApiError(400, f"{param}: {text}" if param else text, param=param or None)


def _message(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "this server does not know or support this field"
    return str(problem["msg"])


def _field(location: Sequence[str | int], body: Any) -> str:
    """The dotted path in the body, without the validator's labels for branches of a union."""
    names: list[str] = []
    value = body
    for depth, part in enumerate(location):
        if isinstance(value, dict) and isinstance(part, str):
            last = depth == len(location) - 1
            if part not in value and not last:
                continue
            names.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            names.append(str(part))
            value = value[part]
    return ".".join(names)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."
