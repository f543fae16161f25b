"""Which deployments are taken, which are refused before anything starts, and the pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.deployments import full_decoder, lora_decoder, write_contract

from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.plain_adapter import loadable_folder
from prefillshare_train.engines.vllm.topology import Topology, parse_decoders, read_decoder


def make(tmp_path: Path, **values: Any) -> Topology:
    decoders = (
        read_decoder("code", full_decoder(tmp_path / "code")),
        read_decoder("tools", lora_decoder(tmp_path / "tools")),
        read_decoder("math", lora_decoder(tmp_path / "math", adapter={"rank_pattern": {"q": 33}})),
    )
    return Topology(**({"base": "the-base", "decoders": decoders, "route": "store"} | values))


def test_lora_decoders_share_one_pool_and_full_ones_have_their_own(tmp_path: Path) -> None:
    pools = make(tmp_path, prefill_replicas=2).pools
    found = [(p.name, p.role, p.model, p.serves, p.replicas) for p in pools]
    assert found == [
        ("prefill", "prefill", "the-base", (), 2),
        ("decode-code", "decode", str(tmp_path / "code"), ("code",), 1),
        ("decode-lora", "decode", "the-base", ("tools", "math"), 1),
    ]
    assert pools[2].max_lora_rank == 64, "33 fits 64, the next rank that vLLM takes"


def test_lora_decoders_may_have_a_pool_each(tmp_path: Path) -> None:
    pools = make(tmp_path, lora_together=False, decode_replicas=3).pools
    assert [(p.name, p.serves, p.replicas) for p in pools[1:]] == [
        ("decode-code", ("code",), 3),
        ("decode-tools", ("tools",), 3),
        ("decode-math", ("math",), 3),
    ]


def test_one_process_holds_the_base_and_all_adapters(tmp_path: Path) -> None:
    adapters = make(tmp_path).decoders[1:]
    (pool,) = Topology(base="b", decoders=adapters, route="lora", prefill_replicas=2).pools
    assert (pool.role, pool.model, pool.serves, pool.replicas) == (
        *("both", "b"),
        *(("tools", "math"), 2),
    )


def test_one_process_refuses_a_decoder_with_full_weights(tmp_path: Path) -> None:
    with pytest.raises(VllmError, match=r"decoder code .*full weights.*--route store"):
        make(tmp_path, route="lora")


def test_a_decoder_in_the_base_s_folder_is_refused(tmp_path: Path) -> None:
    folder = full_decoder(tmp_path / "model")
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(VllmError, match="which is the base's folder too"):
        Topology(base=str(link), decoders=(read_decoder("code", folder),), route="nixl")


def test_two_decoders_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = full_decoder(tmp_path / "model")
    decoders = (read_decoder("a", folder), read_decoder("b", folder))
    with pytest.raises(VllmError, match="which is decoder a's folder too"):
        Topology(base="the-base", decoders=decoders, route="nixl")


def test_names_that_would_be_one_host_are_refused(tmp_path: Path) -> None:
    decoders = tuple(read_decoder(n, full_decoder(tmp_path / n)) for n in ("a.b", "a_b"))
    with pytest.raises(VllmError, match=r"decoders a\.b and a_b would name one host"):
        Topology(base="the-base", decoders=decoders, route="nixl")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["math"], "give NAME=FOLDER"),
        (["=x"], "give NAME=FOLDER"),
        (["a=x", "a=y"], "a is given twice"),
        (["base=x"], "'base' must be"),
        (["Router=x"], "'Router' must be"),
        (["a/b=x"], "'a/b' must be"),
        (["-a=x"], "'-a' must be"),
    ],
)
def test_names_are_checked(texts: list[str], message: str) -> None:
    with pytest.raises(VllmError, match=message):
        parse_decoders(texts)


def test_names_and_folders_are_read() -> None:
    assert parse_decoders(["tool_calling=a=b", "M2.x=c"]) == {
        "tool_calling": Path("a=b"),
        "M2.x": Path("c"),
    }


def test_a_folder_without_contract_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ContractError, match=r"decoder math: .*x has no prefillshare_contract"):
        read_decoder("math", tmp_path / "x")
    with pytest.raises(VllmError, match="is no folder"):
        read_decoder("math", tmp_path / "missing")


def test_a_decoder_that_reads_its_own_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"full_prompt.*Serve it with vLLM alone"):
        read_decoder("math", full_decoder(tmp_path, method="full_prompt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True.*DoRA.*export .* --merge"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 513}, "rank 513; vLLM takes 1 to 512"),
        ({"r": None}, "rank None"),
    ],
)
def test_adapters_that_would_end_vllm_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(VllmError, match=message):
        read_decoder("math", lora_decoder(tmp_path, adapter=settings))


def test_weights_and_settings_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(VllmError, match=r"has no config\.json"):
        read_decoder("math", write_contract(tmp_path / "a"))
    with pytest.raises(VllmError, match=r"adapter_config\.json cannot be read"):
        read_decoder("math", write_contract(tmp_path / "b", adapter="lora"))


def test_an_alora_adapter_is_loaded_from_a_copy_without_invocation_tokens(tmp_path: Path) -> None:
    folder = lora_decoder(tmp_path / "math", adapter={"alora_invocation_tokens": [1, 2]})
    before = (folder / "adapter_config.json").read_bytes()
    decoder = read_decoder("math", folder)
    assert decoder.invocation_tokens == (1, 2)
    for _ in range(2):  # the copy of an earlier start is replaced
        copy = loadable_folder(decoder, tmp_path / "copies")
    assert copy == tmp_path / "copies" / "math"
    expected = json.loads(before)
    del expected["alora_invocation_tokens"]
    assert json.loads((copy / "adapter_config.json").read_text()) == expected
    assert (copy / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (copy / "prefillshare_contract.json").is_file()
    assert (folder / "adapter_config.json").read_bytes() == before, "the decoder's own is as it was"
    assert [p.name for p in copy.parent.iterdir()] == ["math"], "nothing half-written is left"


def test_a_plain_adapter_is_loaded_where_it_lies(tmp_path: Path) -> None:
    decoder = read_decoder("math", lora_decoder(tmp_path / "math"))
    assert loadable_folder(decoder, tmp_path / "copies") == tmp_path / "math"
    assert not (tmp_path / "copies").exists()


def test_nixl_refuses_an_alora_adapter(tmp_path: Path) -> None:
    folder = lora_decoder(tmp_path / "math", adapter={"alora_invocation_tokens": [1, 2]})
    with pytest.raises(VllmError, match=r"aLoRA-format.*--route store or --lora"):
        Topology(base="b", decoders=(read_decoder("math", folder),), route="nixl")
