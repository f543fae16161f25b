"""Who is evaluated: names, the base's revision, and decoders of several K/V dtypes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.vowels import LIMITS, Vowels
from tests.serving.served import save_served

from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.evaluation.compare import compare
from prefillshare_train.evaluation.contestants import Contestants, DecoderSpec
from prefillshare_train.evaluation.run import evaluate
from prefillshare_train.evaluation.tables import html, markdown
from prefillshare_train.evaluation.task import EvaluationError
from prefillshare_train.evaluation.variants import variants_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two decoders, trained on K/V in float32 and, `rounded`, in bfloat16."""
    folder = save_served(tmp_path_factory.mktemp("contestants"), ("math",))
    copied(folder, "rounded", kv_dtype="bfloat16")
    return folder


def copied(folder: Path, name: str, **changes: Any) -> Path:
    """The decoder `math` under another name, with another contract."""
    place = folder / name
    shutil.copytree(folder / "math", place)
    dataclasses.replace(Contract.load(place), **changes).save(place)
    return place


def loaded(folder: Path, *names: str, **options: Any) -> Contestants:
    specs = [DecoderSpec.parse(str(folder / name)) for name in names]
    return Contestants(str(folder / "base"), specs, **options)


def test_decoders_of_two_kv_dtypes_are_refused(folder: Path) -> None:
    message = r"decoder rounded \(.*rounded\) .* K/V in bfloat16, .* makes them in float32.*--dtype"
    with pytest.raises(ContractError, match=message):
        loaded(folder, "math", "rounded")
    assert loaded(folder, "rounded").dtype == torch.bfloat16


def test_another_kv_dtype_that_was_asked_for_is_marked_in_every_table(
    folder: Path, tmp_path: Path
) -> None:
    both = loaded(folder, "math", "rounded", dtype=torch.float32)
    assert [bool(decoder.mismatch) for decoder in both.decoders] == [False, True]
    path = evaluate(both, variants_of(both.decoders, None, []), [Vowels(2)], tmp_path, LIMITS)
    rows = {row["decoder"]: row for row in json.loads(path.read_text())["results"]}
    assert rows["math"]["contract_mismatch"] == ""
    assert "bfloat16" in rows["rounded"]["contract_mismatch"]
    comparison = compare([tmp_path])
    for text in (markdown(comparison), html(comparison, [])):
        assert text.count("(contract does not fit)") == 1
        assert "trained on K/V in bfloat16, and the base makes them in float32" in text


def test_the_revision_is_that_of_the_contracts(folder: Path) -> None:
    base = str(folder / "base")
    copied(folder, "pinned", base_revision="abc")
    copied(folder, "elsewhere", base_revision="xyz", base_id="org/moved")
    assert loaded(folder, "pinned").revision == "abc"
    assert loaded(folder, "pinned", "elsewhere").revision == "abc"
    assert loaded(folder, "pinned", revision="def").revision == "def"
    assert loaded(folder, "math").revision is None
    assert loaded(folder, "pinned", "math").revision is None, "they do not agree"
    assert Contestants(base, [DecoderSpec.parse("base")]).revision is None


def test_the_base_may_have_another_name(folder: Path, tmp_path: Path) -> None:
    spec = DecoderSpec.parse("small=base")
    assert (spec.name, spec.folder) == ("small", None)
    small = Contestants(str(folder / "base"), [spec], revision="main")
    path = evaluate(small, variants_of(small.decoders, None, []), [Vowels(2)], tmp_path, LIMITS)
    summary = json.loads(path.read_text())
    assert summary["base"] == {"id": str(folder / "base"), "revision": "main"}
    assert compare([tmp_path]).names == ["base (small)"]


def test_a_base_that_is_not_there_is_told(tmp_path: Path) -> None:
    for base in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(EvaluationError, match=r"^--base .*: there is no model .*") as error:
            Contestants(base, [DecoderSpec.parse("base")])
        assert "\n" not in str(error.value)
