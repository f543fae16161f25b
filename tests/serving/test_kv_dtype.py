"""Decoders that were trained on K/V of different dtypes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.serving.served import save_served

from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.serving.models import ServedModels


def test_two_kv_dtypes_are_refused_and_another_one_asked_for_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_served(tmp_path, ("math", "full"))
    contract = Contract.load(folder / "full")
    dataclasses.replace(contract, kv_dtype="bfloat16").save(folder / "full")
    base, decoders = str(folder / "base"), {name: folder / name for name in ("math", "full")}
    with pytest.raises(ContractError, match=r"decoder full .*in bfloat16, .*in float32.*--dtype"):
        ServedModels.load(base, decoders)
    models = ServedModels.load(base, decoders, dtype=torch.float32)
    assert models.dtype == torch.float32
    assert "decoder full was trained on K/V in bfloat16" in caplog.text
    assert "decoder math" not in caplog.text
