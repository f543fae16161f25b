"""The model card says what the hub reads and what a person needs; nothing is invented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tests.hub import decoders

from prefillshare_train.core.contract import Contract
from prefillshare_train.evaluation.contestants import _identity
from prefillshare_train.hub.card import CardFacts
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, export_decoder
from prefillshare_train.hub.measured import weights_identity

RECIPE = {
    "base": {"model": "x", "dtype": "float32"},
    "data": {
        "train": {"source": "meta-math/MetaMathQA", "sample": 40000, "revision": "abc"},
        "eval": {"source": "/home/someone/held.jsonl"},
    },
    "boundary": "last_token",
    "training": {"learning_rate": 2e-5, "output_dir": "run"},
}
LOG = [
    {"loss": 0.5, "step": 22},
    {"loss": 0.125, "step": 66},
    # A run that was resumed: the Trainer's mean is of its last start.
    {"train_runtime": 5400.0, "train_loss": 0.125, "total_flos": 1.5e15, "step": 66},
    {"eval_loss": 0.23, "eval_token_accuracy": 0.93, "step": 66},
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return decoders.save_base(tmp_path / "base")


def row(decoder: Path, **values: Any) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "decoder": "math",
        "decoder_sha256": _identity(decoder),
        "prefill": "base",
        "boundary": "last_token",
        "contract_mismatch": "",
        "n": 200,
        "score": 0.425,
        "ci95": [0.3586, 0.4943],
        **values,
    }


def summary(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"results": rows}))
    return folder


def exported_card(decoder: Path, out: Path, **facts: Any) -> tuple[dict[str, Any], str]:
    options = ExportOptions(base_id=decoders.HUB_BASE, card=CardFacts(**facts))
    export_decoder(decoder, out, options, name="someone/math")
    text = (out / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_hub_finds_base_data_metrics_and_emissions(base: Path, tmp_path: Path) -> None:
    decoder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    (decoder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (decoder / "log_history.json").write_text(json.dumps(LOG))
    evaluation = summary(
        tmp_path / "eval",
        row(decoder, prefill="self", boundary=None, score=0.9),
        row(decoder),
        row(decoder, task="bfcl_multiple", score=0.5, n=100),
        row(decoder, decoder_sha256="sha256:0", score=0.99),
        row(decoder, boundary="ratio:0.5", score=0.98),
    )
    data, text = exported_card(
        decoder,
        tmp_path / "out",
        evaluation=evaluation,
        hardware="1x H100",
        co2_grams=420.0,
        license="apache-2.0",
    )
    assert data["base_model"] == decoders.HUB_BASE
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["meta-math/MetaMathQA"]
    assert data["library_name"] == "peft"
    assert data["license"] == "apache-2.0"
    assert {"prefillshare", "cache-conditioned", "lora"} <= set(data["tags"])
    assert data["co2_eq_emissions"]["emissions"] == 420.0
    assert data["co2_eq_emissions"]["hardware_used"] == "1x H100"
    (index,) = data["model-index"]
    found = [
        (r["dataset"]["type"], r["metrics"][0]["type"], r["metrics"][0]["value"])
        for r in index["results"]
    ]
    assert found == [
        ("openai/gsm8k", "exact_match", 42.5),
        ("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "accuracy", 50.0),
    ]
    for part in (
        'PrefillShareModel.from_pretrained("someone/math")',
        Contract.load(decoder).base_fingerprint,
        "| gsm8k | 42.5 | 35.9 to 49.4 | 200 |",
        "**Hardware:** 1x H100",
        "1.50 hours",
        "420 g CO2eq",
        "Mean training loss 0.2500, held-out loss 0.2300, token accuracy 0.9300, 66 steps",
        "meta-math/MetaMathQA) at `abc`, 40000 rows",
        "| eval | `held.jsonl` |",
        "learning_rate: 2.0e-05",
    ):
        assert part in text, part
    assert "/home/someone" not in text
    assert (
        ModelCard(text).data.to_dict() == ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    )


def test_what_nobody_measured_is_not_claimed(base: Path, tmp_path: Path) -> None:
    decoder = decoders.save_decoder(tmp_path / "decoder", base)
    data, text = exported_card(decoder, tmp_path / "out")
    assert data["base_model_relation"] == "finetune"
    assert not {"model-index", "datasets", "co2_eq_emissions", "license"} & set(data)
    assert "**Hardware:** not recorded" in text
    assert "**Carbon emitted:** not measured" in text
    assert "Evaluation" not in text
    out = export_decoder(decoder, tmp_path / "local", ExportOptions())
    local = (out / "README.md").read_text()
    assert "base_model" not in local.split("---\n")[1], "a folder of this machine is no model id"
    assert "\n\n\n" not in text


def test_the_three_lines_of_the_card_load_the_decoder(base: Path, tmp_path: Path) -> None:
    decoder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    out = export_decoder(decoder, tmp_path / "out", ExportOptions())
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]
    assert len(code.strip().splitlines()) == 3
    exec(code, {})


def test_the_alora_lines_of_the_card_load_it_in_peft(base: Path, tmp_path: Path) -> None:
    decoder = decoders.save_decoder(
        tmp_path / "decoder", base, lora={}, boundary="generation_prompt"
    )
    out = export_decoder(decoder, tmp_path / "out", ExportOptions(format="alora"))
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[1], names)
    assert names["model"](input_ids=torch.tensor([[5, 6]])).logits.shape[1] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_sha256": "sha256:0"}, "judges math, and none has the weights of"),
        ({"contract_mismatch": "base fingerprint: …"}, "over another base: base fingerprint"),
        ({"boundary": "ratio:0.5"}, "no row of this decoder with its prompts run by the base up"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(
    base: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    decoder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    evaluation = summary(tmp_path / "eval", row(decoder, **values))
    with pytest.raises(HubError, match=message):
        exported_card(decoder, tmp_path / "out", evaluation=evaluation)
    assert not (tmp_path / "out").exists()
    with pytest.raises(HubError, match="is no evaluation"):
        exported_card(decoder, tmp_path / "out", evaluation=tmp_path / "nothing")


def test_weights_are_named_as_the_evaluation_names_them(base: Path, tmp_path: Path) -> None:
    decoder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    assert weights_identity(decoder) == _identity(decoder)
    out = export_decoder(decoder, tmp_path / "out", ExportOptions())
    assert weights_identity(out) == _identity(decoder), "the exported adapter is the same file"
