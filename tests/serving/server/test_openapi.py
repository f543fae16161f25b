"""The OpenAPI document is true: schemathesis asks what it allows, and what it does not."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from tests.serving.server.fake_engine import FakeEngine

from prefillshare_train.serving.server.app import create_app
from prefillshare_train.serving.server.config import ServerConfig

KEY = {"Authorization": "Bearer secret"}
ENGINE = FakeEngine("Short.", max_prompt_tokens=100_000)
APP = create_app(ENGINE, ServerConfig(api_key="secret"))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
# Limits of this server, such as its longest response, are not all in the document.
NOT_CHECKED = [schemathesis.checks.positive_data_acceptance]


def test_the_document_is_openais_form_only() -> None:
    document: dict[str, Any] = APP.openapi()
    statuses = {
        status
        for path in document["paths"].values()
        for op in path.values()
        for status in op["responses"]
    }
    assert "422" not in statuses
    assert "ErrorResponse" in document["components"]["schemas"]
    assert not [name for name in document["components"]["schemas"] if "Validation" in name]
    assert "/v1/chat/completions" in document["paths"]


@SCHEMA.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_document_says(case: Any) -> None:
    case.call_and_validate(headers=KEY, excluded_checks=NOT_CHECKED)


def test_the_server_lives_after_it() -> None:
    """Runs after the generated requests, some of which it must have served."""
    assert len(ENGINE.requests) > 10
    assert {request.decoder for request in ENGINE.requests} == {"math", "code"}
    assert ENGINE.live == 0
