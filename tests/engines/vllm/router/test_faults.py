"""Instances that fail, at every point of a request; and clients that go away."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from tests.engines.vllm.router.deployment import NEVER, Deployment, deploy
from tests.serving.server.serving import HI, wait_for


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def events_of(running: Deployment, **more: object) -> list[dict[str, object]]:
    """The events of a stream, without the last, `[DONE]`."""
    body = {"model": "math", "messages": HI, "stream": True, **more}
    with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def test_a_dead_prefill_replica_is_replaced() -> None:
    # No health check finds it: the failed call itself must.
    with deploy(prefill=2, health_interval_s=NEVER) as two:
        two.chat(session_id="s")
        (home,) = [stub for stub in two.prefill if stub.calls]
        (other,) = [stub for stub in two.prefill if not stub.calls]
        home.kill()
        assert text_of(two.chat(session_id="s")) == "It is 4."
        assert len(other.calls) == 1
        assert not two.backend.fleet.replicas[home.address].up
        assert two.metric("retries_total") == 1
        # From now on nothing is tried there, and the session has moved.
        text_of(two.chat(session_id="s"))
        assert two.metric("retries_total") == 1


@pytest.mark.parametrize("fault", [409, 429, 500, 503, "error event", "break early"])
def test_a_decode_that_fails_before_its_first_token_is_prefilled_anew(fault: str | int) -> None:
    with deploy(replicas=2, decoders=("math",)) as running:
        first, second = running.pools["math"]
        first.faults.append(fault)
        second.faults.append(fault)
        assert text_of(running.chat()) == "It is 4."
        assert len(running.prefill[0].calls) == 3
        decodes = [*first.calls, *second.calls]
        tickets = [call["kv_transfer_params"]["remote_block_ids"][0] for call in decodes]
        assert len(set(tickets)) == 3


def test_a_dead_decode_replica_is_replaced() -> None:
    with deploy(replicas=2, decoders=("math",), health_interval_s=NEVER) as running:
        first, second = running.pools["math"]
        first.kill()
        assert [text_of(running.chat()) for _ in range(3)] == ["It is 4."] * 3
        assert len(second.calls) == 3
        assert len(running.prefill[0].calls) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["break", "no end"])
def test_after_the_first_token_a_failure_is_told(fault: str, stream: bool) -> None:
    """Another try might go on otherwise; the answer would be a mixture."""
    with deploy(replicas=2, decoders=("math",)) as running:
        for stub in running.pools["math"]:
            stub.faults.append(fault)
        if stream:
            *tokens, last = events_of(running)
            assert len(tokens) >= 2
            assert "error" in last
            assert last["error"]["code"] == "engine_error"  # type: ignore[index]
        else:
            answer = running.chat()
            assert answer.status_code == 500
            assert running.pools["math"][0].address in answer.text
        assert len(running.prefill[0].calls) == 1


def test_tries_are_bounded() -> None:
    with deploy(max_attempts=2) as running:
        running.prefill[0].faults.extend([500] * 9)
        answer = running.chat()
        assert answer.status_code == 500
        assert "told to answer 500" in answer.json()["error"]["message"]
        assert len(running.prefill[0].calls) == 2
        assert running.pools["math"][0].calls == []


@pytest.mark.parametrize(
    ("fault", "status"), [(400, 400), (413, 400), (422, 400), (404, 500), ("garbage", 500)]
)
def test_what_would_be_refused_again_is_not_tried_again(fault: str | int, status: int) -> None:
    """A request that vLLM finds invalid is the client's fault; any other refusal is ours."""
    with deploy() as running:
        running.prefill[0].faults.append(fault)
        answer = running.chat()
        assert answer.status_code == status
        kind = "invalid_request_error" if status == 400 else "server_error"
        assert answer.json()["error"]["type"] == kind
        assert running.prefill[0].address in answer.json()["error"]["message"]
        assert len(running.prefill[0].calls) == 1


def test_a_prefill_without_a_ticket_never_reaches_a_decoder() -> None:
    """The decoder would prefill the prompt itself, with its own weights."""
    with deploy() as running:
        running.prefill[0].handover = "store"
        answer = running.chat()
        assert answer.status_code == 500
        assert "kv_transfer_params" in answer.json()["error"]["message"]
        assert running.pools["math"][0].calls == []


def test_a_slow_prefill_is_tried_elsewhere() -> None:
    with deploy(prefill=2, prefill_timeout_s=0.3) as two:
        for stub in two.prefill:
            stub.faults.append("hang")
        assert text_of(two.chat()) == "It is 4."
        assert [len(stub.calls) for stub in two.prefill] in ([1, 2], [2, 1])
        # It stays up: only its health checks say otherwise.
        assert all(replica.up for replica in two.backend.fleet.prefill)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_prefill(stream: bool) -> None:
    with deploy() as running:
        running.prefill[0].faults.append("hang")
        with pytest.raises(httpx.ReadTimeout):
            running.http.post(
                "/v1/chat/completions",
                json={"model": "math", "messages": HI, "stream": stream},
                timeout=0.3,
            ).read()
        wait_for(lambda: running.prefill[0].aborted == 1)
        assert running.pools["math"][0].calls == []
        wait_for(lambda: running.backend.stats().finished == {"cancelled": 1})


def test_a_client_that_goes_away_ends_the_decode() -> None:
    with deploy(script="x" * 500, delay_s=0.02) as running:
        with pytest.raises(httpx.ReadTimeout):
            running.http.post(
                "/v1/chat/completions", json={"model": "math", "messages": HI}, timeout=0.3
            )
        wait_for(lambda: running.pools["math"][0].aborted == 1)
        body = {"model": "math", "messages": HI, "stream": True}
        with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert any('"content":"x"' in line for line in answer.iter_lines())
        wait_for(lambda: running.pools["math"][0].aborted == 2)
        wait_for(lambda: running.backend.stats().finished == {"cancelled": 2})
        wait_for(lambda: running.backend.fleet.pools["math"][0].running == 0)


def test_a_request_that_is_cancelled_before_it_begins_ends_too() -> None:
    from prefillshare_train.serving.api import Event, GenerationRequest

    with deploy() as running:
        events: list[Event] = []
        request = GenerationRequest("math", (1, 2, 3))
        for _ in range(20):
            running.backend.submit(request, events.append)
            running.backend.cancel(request.request_id)
            wait_for(lambda: running.backend.stats().finished and not running.backend._reserved)
        assert len([event for event in events if event.finish_reason]) == 20


def test_a_restarted_prefill_replica_has_forgotten_everything() -> None:
    with deploy() as running:
        running.complete([7] * 64)
        running.complete([7] * 64)
        assert running.metric("expected_cached_tokens_total") == 64
        stub = running.prefill[0]
        replica = running.backend.fleet.prefill[0]
        stub.kill()
        wait_for(lambda: not replica.up)
        assert running.chat().status_code == 503
        assert running.http.get("/ready").status_code == 503
        stub.start()
        wait_for(lambda: replica.up)
        assert len(replica.kept) == 0
        assert running.metric("replica_restarts_total") == 1
        assert running.complete([7] * 64).status_code == 200
        assert running.metric("expected_cached_tokens_total") == 64


def test_an_instance_that_was_only_away_keeps_what_it_had() -> None:
    with deploy() as running:
        running.complete([7] * 64)
        stub, replica = running.prefill[0], running.backend.fleet.prefill[0]
        stub.healthy = False
        wait_for(lambda: not replica.up)
        stub.healthy = True
        wait_for(lambda: replica.up)
        assert len(replica.kept) == 4


def test_a_request_waits_for_a_replica_that_comes_back_soon() -> None:
    with deploy(health_timeout_s=5) as running:
        stub = running.prefill[0]
        stub.faults.append("hang")
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(running.chat()))
        thread.start()
        wait_for(lambda: len(stub.calls) == 1)
        stub.kill()
        stub.start()
        thread.join(10)
        assert text_of(answers[0]) == "It is 4."
        assert len(stub.calls) == 2


def test_an_instance_that_serves_something_else_is_never_asked() -> None:
    with deploy(decoders=("math",), ready=False) as running:
        stub = running.pools["math"][0]
        stub.names = ("other",)
        running.backend.fleet.replicas[stub.address].lost("told so")
        wait_for(lambda: "does not serve math" in running.http.get("/replicas").text)
        answer = running.chat()
        assert answer.status_code == 503
        assert "--served-model-name" in answer.json()["error"]["message"]
        assert stub.calls == []


def test_an_instance_that_asks_for_a_key() -> None:
    with deploy(decoders=("math",), upstream_api_key="inner") as running:
        for stub in running.stubs:
            stub.key = "inner"
            running.backend.fleet.replicas[stub.address].lost("told so")
        wait_for(lambda: all(r.up for r in running.backend.fleet.replicas.values()))
        assert running.chat().status_code == 200
        running.prefill[0].key = "another"
        running.backend.fleet.prefill[0].lost("told so")
        wait_for(lambda: "API key" in running.http.get("/replicas").text)


def test_a_response_may_hold_what_ends_a_line_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = {"x": "\u2028", "y": "\x85"}  # several bytes, which are several tokens of these models
    with deploy(script="axbyc") as running:
        (stub,) = running.pools["math"]
        chunk = stub._chunk

        def said(*args: Any) -> dict[str, Any]:
            made = chunk(*args)
            (choice,) = made["choices"]
            choice["text"] = spoken.get(choice["text"], choice["text"])
            return made

        monkeypatch.setattr(stub, "_chunk", said)
        assert text_of(running.chat()) == "a\u2028b\x85c"
        assert len(stub.calls) == 1
