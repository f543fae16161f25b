"""LoRA decoders of every kind decode side by side as they do alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.serving.served import engine_of, load_served, request, run, save_served
from torch import nn
from transformers import AutoModelForCausalLM

from prefillshare_train.core.contract import CONTRACT_NAME, ContractError
from prefillshare_train.core.few_rows import FewRowsLinear
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.serving.adapters import NoAdapters, PeftAdapters, StackedAdapters
from prefillshare_train.serving.models import ServedModels

PROMPT = tuple(range(20, 41))


def replace_adapter(folder: Path, name: str, **options: Any) -> None:
    """Put an adapter with other settings where a decoder's was, under the same contract."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(len(name))
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "modules_to_save" in key or "magnitude" in key:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(folder / name)


KINDS: dict[str, tuple[dict[str, Any], type]] = {
    "other ranks and layers": (
        {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
        StackedAdapters,
    ),
    "the head's too": ({"target_modules": ["q_proj", "lm_head"]}, StackedAdapters),
    "rank-stabilised": ({"target_modules": "all-linear", "use_rslora": True}, StackedAdapters),
    "a trained head": (
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        PeftAdapters,
    ),
    "a bias": ({"target_modules": ["q_proj"], "lora_bias": True}, PeftAdapters),
    "DoRA": ({"target_modules": "all-linear", "use_dora": True}, PeftAdapters),
}


def test_what_decodes_has_the_products_of_few_rows_and_the_base_has_not(tmp_path: Path) -> None:
    models = load_served(save_served(tmp_path, ["math", "full"]), ["math", "full"])

    def kinds(model: nn.Module) -> set[type]:
        return {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)}

    for name in ("math", "full"):
        assert kinds(models.decoders[name].lane.model) == {FewRowsLinear}, name
    assert kinds(models.base) == {nn.Linear}


@pytest.mark.parametrize("kind", KINDS)
def test_any_adapter_is_served_as_it_was_trained(tmp_path: Path, kind: str) -> None:
    options, switch = KINDS[kind]
    folder = save_served(tmp_path, ["math", "code", "full"])
    replace_adapter(folder, "code", **options)
    models = load_served(folder, ["math", "code", "full"])
    assert type(models.decoders["code"].lane._adapters) is switch
    assert type(models.decoders["full"].lane._adapters) is NoAdapters
    requests = [request(n, PROMPT, 10) for n in ("math", "code", "full", "base", "code", "math")]
    engine = engine_of(models, 100, max_decode_rows=6)
    found = run(engine, requests)
    answers = {}
    for one in requests:
        answers[one.decoder] = list(found.generation(one.request_id).token_ids)
        loaded = load_decoder(folder / ("math" if one.decoder == "base" else one.decoder))
        cache = loaded.prefill.prefill([PROMPT[:-1]])
        decoder = loaded.decoder
        if one.decoder == "base":
            with loaded.prefill.base_weights():
                expected = generate(
                    decoder, cache, [PROMPT], max_new_tokens=10, stop_ids=engine_stops(models)
                )
        else:
            expected = generate(
                decoder, cache, [PROMPT], max_new_tokens=10, stop_ids=engine_stops(models)
            )
        assert answers[one.decoder] == expected[0], one.decoder
    assert len({tuple(answer) for answer in answers.values()}) == 4


@pytest.mark.parametrize(
    ("value", "switch"), [(float("inf"), PeftAdapters), (3e38, StackedAdapters)]
)
def test_an_adapter_that_overflows_spoils_no_other(
    tmp_path: Path, value: float, switch: type
) -> None:
    folder = save_served(tmp_path, ["math", "code"])
    names = ("math", "base", "code")
    healthy = answers_of(load_served(folder, ["math", "code"]), names)
    path = folder / "code" / "adapter_model.safetensors"
    weights = load_file(path)
    for key in weights:
        if "lora_A" in key:
            weights[key].fill_(value)
    save_file(weights, path)
    models = load_served(folder, ["math", "code"])
    assert type(models.decoders["code"].lane._adapters) is switch
    found = answers_of(models, names)
    assert found["math"] == healthy["math"]
    assert found["base"] == healthy["base"]
    assert found["code"] != healthy["code"]


def answers_of(models: ServedModels, names: tuple[str, ...]) -> dict[str, list[int]]:
    requests = [request(name, PROMPT, 10) for name in names]
    found = run(engine_of(models, 100, max_decode_rows=6), requests)
    return {one.decoder: list(found.generation(one.request_id).token_ids) for one in requests}


def engine_stops(models: ServedModels) -> tuple[int, ...]:
    return models.renderer.end_token_ids


def test_adapters_and_prefill_share_one_copy_of_the_weights(models: ServedModels) -> None:
    mine = {p.data_ptr() for p in models.base.parameters()}
    lane = models.decoders["math"].lane.model
    assert {p.data_ptr() for p in lane.parameters()} == mine
    assert models.decoders["code"].lane is models.decoders["math"].lane


def test_rows_must_be_named(models: ServedModels) -> None:
    lane = models.decoders["math"].lane.model
    with pytest.raises(RuntimeError, match="without its rows being named"):
        lane(input_ids=torch.tensor([[5]]))


def test_decoders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_served(tmp_path, ["math", "code"])
    contract = folder / "code" / CONTRACT_NAME
    right = contract.read_text()
    contract.write_text(
        right.replace('"base_fingerprint": "sha256:', '"base_fingerprint": "sha256:0')
    )
    with pytest.raises(ContractError, match=r"(?s)decoder code .*base fingerprint: trained with"):
        load_served(folder, ["math", "code"])
    contract.write_text(right.replace('"system_prompt": null', '"system_prompt": "Be brief."'))
    with pytest.raises(ContractError, match=r"(?s)decoder code .*system_prompt"):
        load_served(folder, ["math", "code"])
