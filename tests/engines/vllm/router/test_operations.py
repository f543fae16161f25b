"""Drain, overload, metrics, limits: what operators rely on."""

from __future__ import annotations

import signal
import threading

import httpx
import pytest
from tests.engines.vllm.router.deployment import deploy
from tests.serving.server.serving import HI, wait_for


def test_a_replica_that_drains_gets_nothing_new() -> None:
    with deploy(prefill=2, replicas=2, decoders=("math",), script="x" * 40, delay_s=0.02) as four:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(four.chat()))
        thread.start()
        wait_for(lambda: any(stub.calls for stub in four.pools["math"]))
        (busy,) = [stub for stub in four.pools["math"] if stub.calls]
        drained = four.http.post("/replicas/drain", json={"address": busy.address}).json()
        assert drained["draining"]
        assert drained["running"] == 1
        four.http.post("/replicas/drain", json={"address": four.prefill[0].address})
        before = len(busy.calls), len(four.prefill[0].calls)
        assert all(four.chat(max_tokens=2).status_code == 200 for _ in range(4))
        assert (len(busy.calls), len(four.prefill[0].calls)) == before
        thread.join(10)
        assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 40
        four.http.post("/replicas/drain", json={"address": busy.address, "draining": False})
        states = four.http.get("/replicas").json()["replicas"]
        assert [state["address"] for state in states if state["draining"]] == [
            four.prefill[0].address
        ]


def test_where_all_replicas_drain_requests_are_refused() -> None:
    with deploy() as running:
        running.http.post("/replicas/drain", json={"address": running.prefill[0].address})
        answer = running.chat()
        assert answer.status_code == 503
        assert "it drains" in answer.json()["error"]["message"]
        assert running.http.get("/ready").status_code == 503


def test_draining_an_unknown_replica() -> None:
    with deploy() as running:
        answer = running.http.post("/replicas/drain", json={"address": "http://127.0.0.1:1"})
        assert answer.status_code == 404
        assert running.http.post("/replicas/drain", json={"adress": "x"}).status_code == 400


def test_sigterm_lets_what_runs_finish() -> None:
    with deploy(script="x" * 40, delay_s=0.02) as running:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(running.chat()))
        thread.start()
        wait_for(lambda: bool(running.pools["math"][0].calls))
        running.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: running.http.get("/ready").status_code == 503)
        assert running.chat().status_code == 503
        thread.join(10)
        assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 40


def test_one_too_many_is_told_when_to_come_back() -> None:
    with deploy(script="x" * 40, delay_s=0.02, max_running=2) as running:
        threads = [threading.Thread(target=running.chat) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(running.pools["math"][0].calls) == 2)
        answer = running.chat()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert running.chat(max_tokens=1).status_code == 200


def test_metrics_and_usage() -> None:
    with deploy(prefill=1) as running:
        running.prefill[0].cached = 16
        usage = running.complete([1] * 40).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 16
        assert usage["prefillshare"]["prefilled_tokens"] == 40 - 1 - 16
        assert usage["prefillshare"]["decoder_prompt_tokens"] == 1
        running.complete([1] * 40, model="code")
        text = running.http.get("/metrics").text
        base, math = running.prefill[0].address, running.pools["math"][0].address
        for line in (
            f'prefillshare_router_prefill_seconds_count{{replica="{base}"}} 2.0',
            "prefillshare_router_decode_first_token_seconds_count"
            f'{{decoder="math",replica="{math}"}} 1.0',
            f'prefillshare_router_cached_tokens_total{{replica="{base}"}} 32.0',
            f'prefillshare_router_expected_cached_tokens_total{{replica="{base}"}} 32.0',
            f'prefillshare_router_replica_up{{replica="{base}",role="prefill"}} 1.0',
            f'prefillshare_router_replica_running{{replica="{math}",role="decode"}} 0.0',
            'prefillshare_time_to_first_token_seconds_count{decoder="code"} 1.0',
            'prefillshare_router_unshared_tokens_total{decoder="math"} 0.0',
            'prefillshare_responses_total{decoder="math",finish_reason="stop"} 1.0',
        ):
            assert line in text, line
        assert "prefillshare_prefix_hit_ratio 0.4" in text


def test_prompt_tokens_that_a_decoder_ran_itself_are_counted() -> None:
    with deploy() as running:
        stub = running.pools["math"][0]
        stub.shared_tokens = 39
        running.complete([1] * 40)
        wait_for(lambda: running.backend.stats().decoding == 0)
        assert running.metric("unshared_tokens_total") == 0
        stub.shared_tokens = 32
        running.complete([1] * 40)
        wait_for(lambda: running.metric("unshared_tokens_total") == 7)


def test_the_context_is_the_shortest_of_the_instances() -> None:
    with deploy(max_model_len=300) as running:
        models = running.http.get("/v1/models").json()["data"]
        assert {model["max_model_len"] for model in models} == {300}
        answer = running.complete([1] * 300)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert running.prefill[0].calls == []
    with deploy() as running:
        assert running.http.get("/v1/models").json()["data"][0]["max_model_len"] == 2048


def test_an_api_key_guards_all_but_health() -> None:
    with deploy(server={"api_key": "secret"}) as running:
        assert running.http.get("/health").status_code == 200
        assert running.http.get("/ready").status_code == 200
        for path in ("/replicas", "/metrics", "/v1/models"):
            assert running.http.get(path).status_code == 401
        assert running.http.post("/replicas/drain", json={"address": "x"}).status_code == 401
        assert running.chat().status_code == 401
        key = {"Authorization": "Bearer secret"}
        body = {"model": "math", "messages": HI}
        answer = running.http.post("/v1/chat/completions", json=body, headers=key)
        assert answer.status_code == 200
        assert "Authorization" not in str(running.prefill[0].calls)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "messages": HI}, 404),
        ({"model": "base", "messages": HI}, 404),
        ({"model": "math", "messages": []}, 400),
        ({"model": "math", "messages": HI, "kv_transfer_params": {}}, 400),
        ({"model": "math", "messages": HI, "max_tokens": 0}, 400),
        ({"model": "math"}, 400),
        ([], 400),
    ],
)
def test_malformed_requests_reach_no_instance(body: object, status: int) -> None:
    with deploy() as running:
        answer = running.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert running.prefill[0].calls == []
