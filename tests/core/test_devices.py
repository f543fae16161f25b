"""bfloat16 only where a machine multiplies in it, and a word where it is used all the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.training import tiny

from prefillshare_train.core import devices
from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.training.recipe import BaseConfig, parse_recipe


def cpu_with(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """A machine without GPUs, whose CPU has products in these dtypes and in float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_cpu_has", lambda dtype: dtype in dtypes)
    devices._warn_once.cache_clear()


def test_the_default_is_what_the_device_multiplies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, torch.bfloat16)
    assert devices.default_dtype() == torch.bfloat16
    assert BaseConfig(model="m").dtype == "bfloat16"
    cpu_with(monkeypatch)
    assert devices.default_dtype() == torch.float32
    assert BaseConfig(model="m").dtype == "float32"
    assert BaseConfig(model="m", dtype="bfloat16").dtype == "bfloat16", "what is said is done"


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_emulates_bfloat16_gets_float32(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.default_dtype() == expected


def test_a_run_on_the_cpu_of_a_gpu_machine_asks_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)

    def dtype(use_cpu: bool, **base: str) -> str:
        training = {"output_dir": "o", "use_cpu": use_cpu, "bf16": "auto"}
        data = {"train": {"source": "r"}}
        recipe = parse_recipe({"base": {"model": "m", **base}, "data": data, "training": training})
        assert recipe.bf16 == (recipe.base.dtype == "bfloat16")
        return recipe.base.dtype

    assert dtype(use_cpu=False) == "bfloat16"
    assert dtype(use_cpu=True) == "float32"
    assert dtype(use_cpu=True, dtype="bfloat16") == "bfloat16", "what is said is done"


def test_the_cpu_is_asked_as_torch_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    devices._cpu_has.cache_clear()
    asked = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert devices.has_fast_products(torch.bfloat16, "cpu") == asked
    assert devices.has_fast_products(torch.float32, "cpu")
    devices._cpu_has.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not devices.has_fast_products(torch.bfloat16, "cpu")
    devices._cpu_has.cache_clear()


def test_a_slow_dtype_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny.save_base(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        cpu_with(monkeypatch, torch.bfloat16)
        load_causal_lm(folder, dtype=torch.bfloat16, device="cpu")
        cpu_with(monkeypatch)
        load_causal_lm(folder, dtype=torch.float32, device="cpu")
        assert "matrix products" not in caplog.text
        for _ in range(2):
            load_causal_lm(folder, dtype=torch.bfloat16, device="cpu")
    assert caplog.text.count("this CPU has no matrix products in bfloat16") == 1
    assert "--dtype float32" in caplog.text


def test_a_base_alone_has_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny.save_base(tmp_path / "base"))
    cpu_with(monkeypatch)
    assert DecoderSet(folder, {}).dtype == torch.float32
    cpu_with(monkeypatch, torch.bfloat16)
    assert DecoderSet(folder, {}).dtype == torch.bfloat16
