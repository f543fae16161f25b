"""Where requests go, and what goes there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from tests.engines.vllm.router.deployment import Deployment, deploy
from tests.serving.server.fake_engine import renderer
from tests.serving.server.serving import HI


@pytest.fixture(scope="module")
def nixl() -> Iterator[Deployment]:
    with deploy() as running:
        yield running


def test_the_decoder_is_chosen_by_name_after_one_prefill(nixl: Deployment) -> None:
    for name, other in (("math", "code"), ("code", "math")):
        before = {id(stub): len(stub.calls) for stub in nixl.stubs}
        assert nixl.chat(name).json()["choices"][0]["message"]["content"] == "It is 4."
        came = {id(stub): len(stub.calls) - before[id(stub)] for stub in nixl.stubs}
        assert came[id(nixl.prefill[0])] == 1
        assert came[id(nixl.pools[name][0])] == 1
        assert came[id(nixl.pools[other][0])] == 0
        assert nixl.pools[name][0].calls[-1]["model"] == name
    assert nixl.prefill[0].calls[-1]["model"] == "base"


def test_base_and_decoder_get_the_token_ids_that_the_contract_renders(nixl: Deployment) -> None:
    nixl.chat("math", cache_salt="mine")
    prefill, decode = nixl.prefill[0].calls[-1], nixl.pools["math"][0].calls[-1]
    assert prefill["prompt"] == decode["prompt"] == renderer().prompt_ids(HI)
    assert prefill["cache_salt"] == decode["cache_salt"] == "mine"
    assert "messages" not in prefill
    assert "messages" not in decode


def test_each_response_has_a_prefill_of_its_own(nixl: Deployment) -> None:
    """A ticket is good for one decode: the base then frees the blocks."""
    before = len(nixl.prefill[0].calls)
    assert len(nixl.chat(n=3).json()["choices"]) == 3
    assert len(nixl.prefill[0].calls) - before == 3
    decodes = nixl.pools["math"][0].calls[-3:]
    assert len({call["kv_transfer_params"]["remote_block_ids"][0] for call in decodes}) == 3
    assert len(set(nixl.pools["math"][0].ids)) == len(nixl.pools["math"][0].ids)


def test_every_sampling_value_is_written_out(nixl: Deployment) -> None:
    """What is left open, an instance takes from the model's generation configuration."""
    nixl.chat(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, seed=7, stop=["X"]
    )
    call = nixl.pools["math"][0].calls[-1]
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["X"],
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    assert {name: call[name] for name in wanted} == wanted
    assert set(renderer().end_token_ids) <= set(call["stop_token_ids"])
    nixl.chat(ignore_eos=True, stop_token_ids=[9])
    assert nixl.pools["math"][0].calls[-1]["stop_token_ids"] == [9]
    assert nixl.prefill[0].calls[-1]["temperature"] == 0


def test_the_store_route_sends_no_ticket() -> None:
    with deploy(handover="store") as store:
        assert store.chat("code").status_code == 200
        assert "kv_transfer_params" not in store.prefill[0].calls[-1]
        assert "kv_transfer_params" not in store.pools["code"][0].calls[-1]


def test_one_process_gets_the_base_call_and_then_the_adapters() -> None:
    with deploy(handover="store", prefill=2, replicas=0) as both:
        assert both.chat("code").status_code == 200
        calls = [[call["model"] for call in stub.calls] for stub in both.prefill]
        assert sorted(calls) == [[], ["base", "code"]]


def test_a_longer_prompt_goes_where_its_beginning_is_kept() -> None:
    with deploy(prefill=3) as three:
        for start in range(6):
            three.complete([start] * 64)
        first = [stub.calls[:] for stub in three.prefill]
        for start in range(6):
            three.complete([start] * 64 + [99] * 32, model="code")
        for stub, before in zip(three.prefill, first, strict=True):
            begun = {call["prompt"][0] for call in before}
            assert {call["prompt"][0] for call in stub.calls[len(before) :]} == begun


def test_another_salt_finds_nothing_kept() -> None:
    with deploy(prefill=2) as two:
        two.complete([1] * 64, cache_salt="a")
        expected = two.metric("expected_cached_tokens_total")
        two.complete([1] * 64, cache_salt="b")
        assert two.metric("expected_cached_tokens_total") == expected == 0
        two.complete([1] * 64, cache_salt="b")
        assert two.metric("expected_cached_tokens_total") == 64


def test_a_session_stays_and_is_forgotten_at_its_end() -> None:
    with deploy(prefill=2, delay_s=0.02) as two:
        two.chat(session_id="s")
        (home,) = [stub for stub in two.prefill if stub.calls]
        # Other prompts of the session, while the home has more to do than the other.
        replica = two.backend.fleet.replicas[home.address]
        with replica.busy(10_000):
            two.complete("something else", session_id="s")
            assert len(home.calls) == 2
            two.complete("something else again", session_id="s", end_session=True)
            assert len(home.calls) == 3
            two.complete("something new", session_id="s")
        assert len(home.calls) == 3


def test_the_least_loaded_replica_of_the_pool_decodes() -> None:
    with deploy(replicas=3, decoders=("math",), delay_s=0.05) as pool:
        threads = [threading.Thread(target=pool.chat) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(stub.calls) for stub in pool.pools["math"]] == [2, 2, 2]


def test_a_decoder_may_have_another_name_at_its_instances() -> None:
    with deploy(models={"math": "math-v2"}) as running:
        assert running.chat().status_code == 200
        assert running.pools["math"][0].calls[-1]["model"] == "math-v2"
        assert running.chat().json()["model"] == "math"


def test_decoders_own_header_needs_a_header() -> None:
    with deploy(handover="store", rule="generation_prompt") as store:
        usage = store.chat().json()["usage"]["prefillshare"]
        header = len(renderer().encode(["<|im_start|>assistant\n"])[0])
        assert usage["decoder_prompt_tokens"] == header
        answer = store.complete("no header here")
        assert answer.status_code == 400
        assert "assistant header" in answer.json()["error"]["message"]
