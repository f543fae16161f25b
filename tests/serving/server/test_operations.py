"""Models, health, metrics and statistics."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import Served, serve

from prefillshare_train.serving.api import Event, Usage
from prefillshare_train.serving.server.metrics import ServerMetrics


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(FakeEngine("four words of text")) as running:
        yield running


def metrics(served: Served) -> dict[str, float]:
    """Samples by name and labels."""
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): (
            sample.value
        )
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_latencies_and_tokens_are_told_by_decoder(served: Served) -> None:
    before = metrics(served)
    assert before["prefillshare_time_to_first_token_seconds_count decoder=code"] == 0
    assert before["prefillshare_prefix_hit_ratio"] == 0
    for _ in range(2):
        answer = served.chat(model="code").json()
    after = metrics(served)
    for name in (
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "request_duration_seconds",
        "queue_seconds",
    ):
        assert after[f"prefillshare_{name}_count decoder=code"] == 2
        assert after[f"prefillshare_{name}_count decoder=math"] == 0
    prompt = answer["usage"]["prompt_tokens"]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert after["prefillshare_tokens_total decoder=code kind=prompt"] == 2 * prompt
    assert after["prefillshare_tokens_total decoder=code kind=cached"] == cached > 0
    assert after["prefillshare_responses_total decoder=code finish_reason=stop"] == 2
    assert after["prefillshare_prefix_hit_ratio"] == pytest.approx(cached / (2 * prompt))
    assert after["prefillshare_kv_blocks"] == 64
    assert after["prefillshare_kv_staged_out_bytes_total"] == 0
    assert after["prefillshare_http_responses_total status=200"] >= 3


def test_time_per_output_token_leaves_the_first_out() -> None:
    with serve(FakeEngine("xyz", delay_s=0.05)) as served:
        served.chat()
        after = metrics(served)
    total = after["prefillshare_time_per_output_token_seconds_sum decoder=math"]
    assert 0.049 < total < 0.5


def test_a_cancelled_response_is_no_measurement() -> None:
    metrics = ServerMetrics(["math"], FakeEngine().stats)
    usage = Usage(10, 0, 9, 1, 3, 0.1, 0.2, 0.5)
    for reason in ("cancelled", "stop"):
        metrics.finished("math", Event("r", finish_reason=reason, usage=usage))
    text = metrics.exposition().decode()
    assert 'request_duration_seconds_count{decoder="math"} 1.0' in text
    assert 'responses_total{decoder="math",finish_reason="cancelled"} 1.0' in text
    assert 'tokens_total{decoder="math",kind="prompt"} 20.0' in text


def test_tokens_of_a_prompt_that_never_left_the_queue_are_not_counted() -> None:
    metrics = ServerMetrics(["math"], FakeEngine().stats)
    usage = Usage(40, 0, 0, 1, 0, 0.2, None, 0.3, started=False)
    metrics.finished("math", Event("r", finish_reason="cancelled", usage=usage))
    text = metrics.exposition().decode()
    assert 'finish_reason="cancelled"} 1.0' in text
    assert 'prefillshare_tokens_total{decoder="math",kind="prompt"}' not in text


def test_two_servers_do_not_mix_their_metrics(served: Served) -> None:
    served.chat()
    with serve() as other:
        assert "prefillshare_responses_total decoder=math finish_reason=stop" not in metrics(other)


def test_refusals_are_counted(served: Served) -> None:
    served.chat(n=0)
    assert metrics(served)["prefillshare_http_responses_total status=400"] == 1


def test_stats_for_the_page(served: Served) -> None:
    nothing = served.http.get("/stats").json()
    assert nothing["hit_ratio"] is None
    assert nothing["decoders"]["math"] == {
        "responses": 0,
        "ttft_last_s": None,
        "ttft_p50_s": None,
        "ttft_p95_s": None,
    }
    served.chat()
    stats = served.http.get("/stats").json()
    assert stats["accepting"] is True
    assert stats["decoders"]["math"]["responses"] == 1
    assert stats["decoders"]["math"]["ttft_p95_s"] > 0
    assert stats["engine"]["blocks_total"] == 64


def test_ready_needs_a_worker(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.http.get("/ready").json() == {"status": "ready"}
    stats = served.engine.stats()
    object.__setattr__(stats, "workers_alive", 0)
    monkeypatch.setattr(served.engine, "stats", lambda: stats)
    assert served.http.get("/ready").status_code == 503
    assert served.http.get("/health").status_code == 200


def test_models_tell_how_long_a_context_may_be(served: Served) -> None:
    model = served.http.get("/v1/models/code").json()
    assert (model["id"], model["max_model_len"]) == ("code", 512)
    assert served.http.get("/v1/models/other").status_code == 404


def test_the_page_may_load_nothing_from_elsewhere(served: Served) -> None:
    page = served.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) >= 3
    script = served.http.get("/page/chat.js").text
    files += re.findall(r'from "([^"]+)"', script)
    for path in files:
        assert path.startswith("/page/")
        assert served.http.get(path).status_code == 200
    for path in ("/page/chat.js", "/page/charts.js"):
        text = served.http.get(path).text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
