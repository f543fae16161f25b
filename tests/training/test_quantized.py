"""A quantised base: what works, and what is refused by name before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.helpers import write_jsonl
from tests.training import tiny
from transformers import AutoModelForCausalLM

from prefillshare_train.core.loading import load_decoder
from prefillshare_train.training.recipe import LoadedRecipe, RecipeError, load_recipe
from prefillshare_train.training.run import prepare_data, run_training

RECIPE = """
base: {{model: {base}, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}, eval_fraction: 0.2}}
training: {{output_dir: {out}, max_steps: 3, learning_rate: 0.0, report_to: none,
           logging_steps: 1, per_device_train_batch_size: 24, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_base(tmp_path / "base")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    text = RECIPE.format(base=tmp_path / "base", rows=source, out=tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def quantised(folder: Path, *overrides: str, **settings: Any) -> LoadedRecipe:
    path = folder / "base" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    return load_recipe([folder / "recipe.yaml"], list(overrides))


EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_methods_that_nobody_proved_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="quantised by 'gptq', over which no decoder"):
        prepare_data(quantised(folder, quant_method="gptq", bits=4))


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        prepare_data(quantised(folder, **EIGHT))


def test_what_cannot_work_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(RecipeError, match=r"cannot be trained\. Set decoder\.adapter: lora"):
        prepare_data(quantised(folder, "decoder.adapter=none", **EIGHT))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(RecipeError, match="Use 8 bits or an accelerator"):
        prepare_data(quantised(folder, **four))


def test_a_lora_decoder_over_an_8_bit_base_trains_and_loads(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    model.save_pretrained(folder / "base")
    result = run_training(load_recipe([folder / "recipe.yaml"]))
    assert result.decoder is not None
    losses = tiny.losses(result.trainer)
    same = pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses == same, "the base moved under a decoder that learns nothing"
    loaded = load_decoder(result.decoder)
    layer = loaded.prefill.causal_lm.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    assert layer.weight.dtype == torch.int8
