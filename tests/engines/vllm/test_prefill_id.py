"""Fingerprints read off files, and the check that refuses a decoder before anything starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.core import families
from tests.hub import decoders
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from prefillshare_train.core.boundary import header_length
from prefillshare_train.core.contract import Contract, ContractError, weights_fingerprint
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.engines.vllm import fingerprint
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.fingerprint import base_fingerprint
from prefillshare_train.engines.vllm.prefill_id import (
    NIXL_RULES,
    PrefillId,
    check_decoder,
    serving_fingerprint,
)

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def full(tmp_path: Path, base: Path) -> Path:
    return decoders.save_decoder(tmp_path / "full", base)


def test_files_and_the_loaded_model_have_one_fingerprint(base: Path) -> None:
    expected = weights_fingerprint(load_causal_lm(str(base), dtype=torch.bfloat16))
    assert base_fingerprint(str(base)) == expected
    assert [path.name for path in base.iterdir() if path.name.startswith("fingerprint")] == []


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_in_other_families_too(family: str, tmp_path: Path) -> None:
    model = families.build(family, torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert base_fingerprint(str(tmp_path / "base")) == weights_fingerprint(model)


def test_weights_under_other_names_are_read_off_the_model(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = base_fingerprint(str(base))
    (fingerprint._cache_folder() / next(fingerprint._cache_folder().iterdir()).name).unlink()
    plain = AutoModelForCausalLM.from_config

    def renamed(config: object) -> object:
        model = plain(config)
        model.register_parameter("elsewhere", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", renamed)
    assert base_fingerprint(str(base)) == expected


def test_it_is_kept_until_a_file_changes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base_fingerprint(str(base))
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "_of_files", lambda *_: pytest.fail("read again"))
        assert base_fingerprint(str(base)) == first
    model = LlamaForCausalLM.from_pretrained(base)
    decoders.perturb(model)
    model.save_pretrained(base)
    assert base_fingerprint(str(base)) != first


def test_a_spoiled_cache_is_made_again(base: Path) -> None:
    first = base_fingerprint(str(base))
    (kept,) = fingerprint._cache_folder().iterdir()
    kept.write_text("{")
    assert base_fingerprint(str(base)) == first


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VllmError, match="neither a folder nor a hub id"):
        base_fingerprint("no such/hub/id")
    with pytest.raises(VllmError, match="safetensors"):
        base_fingerprint(str(tmp_path))


def config_of(base: Path) -> PreTrainedConfig:
    return fingerprint.base_config(str(base))


def test_a_decoder_of_this_base_fits(base: Path, full: Path) -> None:
    found = check_decoder(
        full,
        base_fingerprint=base_fingerprint(str(base)),
        kv_dtype="float32",
        config=config_of(base),
    )
    assert found.base_length(range(10)) == 9


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"base_fingerprint": OTHER}, (OTHER, "sha256:")),
        ({"kv_dtype": "bfloat16"}, ("'bfloat16'", "'float32'")),
        ({"method": "full_prompt"}, ("'full_prompt'", "'prefillshare'")),
        ({"boundary": "ratio:0.5"}, ("'ratio:0.5'", "'last_token'")),
    ],
)
def test_each_mismatch_names_both_values(
    base: Path, full: Path, change: dict[str, str], both: tuple[str, str]
) -> None:
    dataclasses.replace(Contract.load(full), **change).save(full)
    with pytest.raises(ContractError) as caught:
        check_decoder(
            full,
            base_fingerprint=base_fingerprint(str(base)),
            kv_dtype="float32",
            config=config_of(base),
            rules=NIXL_RULES,
        )
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert all(value in line for value in both)


def test_the_same_weights_with_another_rope_do_not_fit(base: Path, full: Path) -> None:
    fits = base_fingerprint(str(base))
    settings = json.loads((base / "config.json").read_text())
    theta = settings["rope_parameters"]["rope_theta"]
    settings["rope_parameters"]["rope_theta"] = 2 * theta
    (base / "config.json").write_text(json.dumps(settings))
    assert base_fingerprint(str(base)) == fits, "the weights are the same"
    with pytest.raises(ContractError, match=rf"rope_parameters: .*{theta}.*{2 * theta}"):
        check_decoder(full, base_fingerprint=fits, kv_dtype="float32", config=config_of(base))


def test_the_header_of_generation_prompt_is_told_from_the_template(
    tmp_path: Path, base: Path
) -> None:
    folder = decoders.save_decoder(tmp_path / "d", base, lora={}, boundary="generation_prompt")
    found = check_decoder(
        folder,
        base_fingerprint=base_fingerprint(str(base)),
        kv_dtype="float32",
        config=config_of(base),
    )
    header = decoders.renderer_of(base).encode(["<|im_start|>assistant\n"])[0]
    assert len(header) > 1
    assert found.base_length([5, *header]) == 1
    with pytest.raises(ValueError, match="assistant header"):
        found.base_length([5, 6])
    assert header_length([*header, 9, *header, 9], header) == len(header) + 1


def test_the_base_must_be_what_it_is_called(base: Path, full: Path, tmp_path: Path) -> None:
    found = base_fingerprint(str(base))
    assert serving_fingerprint(None, None, str(base)) == found
    assert serving_fingerprint(str(base), found, str(full)) == found
    assert serving_fingerprint(None, OTHER, str(full)) == OTHER
    with pytest.raises(ContractError, match="name the base"):
        serving_fingerprint(None, None, str(full))
    with pytest.raises(ContractError, match=f"{OTHER}.*{found}"):
        serving_fingerprint(str(base), OTHER, str(full))
    (full / "prefillshare_contract.json").unlink()
    with pytest.raises(ContractError, match="must be the base"):
        serving_fingerprint(str(base), None, str(full))


def test_the_id_tells_blocks_apart() -> None:
    def config(
        dtype: str = "bfloat16", cache: str = "auto", block: int = 32, theta: float = 1e4
    ) -> SimpleNamespace:
        rope = {"rope_type": "default", "rope_theta": theta}
        model = SimpleNamespace(
            hf_text_config=LlamaConfig(rope_parameters=rope),
            dtype=getattr(torch, dtype),
            get_total_num_hidden_layers=lambda: 30,
            get_total_num_kv_heads=lambda: 3,
            get_head_size=lambda: 64,
        )
        return SimpleNamespace(
            model_config=model,
            cache_config=SimpleNamespace(cache_dtype=cache, block_size=block),
        )

    made = PrefillId.of(config(), OTHER)
    assert made.cache_dtype == "bfloat16"
    others = [config("float32"), config(cache="fp8"), config(block=64), config(theta=1e6)]
    digests = {PrefillId.of(other, OTHER).digest for other in (config(), *others)}
    assert len(digests) == 5
    assert PrefillId.of(config(), "sha256:1").digest not in digests
