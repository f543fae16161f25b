"""Training on a GPU: the CPU's curve, resuming, several decoders, options, quantised bases."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import tiny
from transformers import AutoModelForCausalLM

from prefillshare_train.core.loading import load_decoder
from prefillshare_train.hub.model import PrefillShareModel
from prefillshare_train.training.comparison import HeldOut
from prefillshare_train.training.decoders import train_decoders
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import prepare_data, run_training
from prefillshare_train.training.trainer import CacheConditionedTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def curve(folder: Path, adapter: str, **options: Any) -> list[float]:
    decoder = tiny.model() if adapter == "none" else tiny.lora()
    base = copy.deepcopy(decoder) if adapter == "none" else None
    arguments = tiny.arguments(folder, use_cpu=options.pop("use_cpu", False), **options)
    trainer = CacheConditionedTrainer(
        decoder, arguments, base=base, train_dataset=tiny.conversations(24)
    )
    trainer.train()
    assert trainer.prefill is not None
    assert trainer.prefill.device.type == ("cpu" if arguments.use_cpu else "cuda")
    return tiny.losses(trainer)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_cpus_curve_is_followed(tmp_path: Path, adapter: str) -> None:
    expected = curve(tmp_path / "cpu", adapter, use_cpu=True)
    assert curve(tmp_path / "gpu", adapter) == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx([expected[0]] * len(expected), rel=1e-3), "all steps alike"


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "offload_prompt_cache": True},
        {"prefill_memory_mib": 1},
        {"bf16": True},
    ],
    ids=["checkpointing", "offload", "chunks", "bf16"],
)
def test_memory_options_leave_the_curve(
    tmp_path: Path, adapter: str, options: dict[str, Any]
) -> None:
    plain = curve(tmp_path / "plain", adapter)
    changed = curve(tmp_path / "changed", adapter, **options)
    assert changed == pytest.approx(plain, rel=3e-2 if "bf16" in options else 1e-3)


def recipe(tmp_path: Path, **changes: Any) -> Path:
    training = {
        "max_steps": 6,
        "learning_rate": 0.01,
        "save_steps": 3,
        "generate_every": 3,
        "generate_rows": 2,
    }
    return tiny.save_recipe(tmp_path, training, **changes)


def losses(decoder: Path) -> list[float]:
    history = json.loads((decoder / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_recipe_trains_resumes_and_answers_on_the_gpu(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    whole = run_training(load_recipe([path])).decoder
    assert whole is not None
    (tmp_path / "half").mkdir()
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "half" / "checkpoint-3")
    half = load_recipe([path], [f"training.output_dir={tmp_path / 'half'}"])
    resumed = run_training(half, resume=True).decoder
    assert resumed is not None
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(whole)) == 6
    data = prepare_data(load_recipe([path]))
    found = []
    for device in (None, "cpu"):
        loaded = load_decoder(whole, device=device)
        held_out = HeldOut(data, data.eval_examples, max_new_tokens=8)
        score = held_out.score("ours", loaded.decoder, loaded.prefill, loaded.contract.rule)
        found.append((score.held_out_loss, [answer.text for answer in score.answers]))
    assert found[0] == (pytest.approx(found[1][0], rel=1e-4), found[1][1])
    prompts = torch.randint(5, 60, (2, 11))
    answers = []
    for device in (None, "cpu"):
        model = PrefillShareModel.from_pretrained(whole, device=device)
        assert model.device.type == (device or "cuda")
        answers.append(model.generate(prompts, max_new_tokens=12).tolist())
    assert answers[0] == answers[1]


def test_several_decoders_equal_runs_of_their_own(tmp_path: Path) -> None:
    decoders: dict[str, Any] = {"a": {}, "b": {"training": {"learning_rate": 0.03}}}
    together = train_decoders(load_recipe([recipe(tmp_path, decoders=decoders)]))
    for name, result in together.items():
        folder = tmp_path / f"alone-{name}"
        folder.mkdir()
        path = recipe(folder)
        rate = decoders[name].get("training", {}).get("learning_rate", 0.01)
        loaded = load_recipe(
            [path], [f"training.learning_rate={rate}", f"training.output_dir={folder / 'run'}"]
        )
        alone = run_training(loaded).decoder
        assert alone is not None
        assert result.decoder is not None
        assert losses(result.decoder) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lora_decoder_over_a_quantised_base(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    path = recipe(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    model.save_pretrained(tmp_path / "base")
    result = run_training(load_recipe([path], ["training.generate_every=0"]))
    assert result.decoder is not None
    seen = tiny.losses(result.trainer)
    assert seen[-1] < seen[0]
    assert result.trainer.prefill is not None
    loaded = load_decoder(result.decoder)  # checks that the base did not move
    layer = loaded.prefill.causal_lm.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    assert layer.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    with torch.no_grad():
        trained = result.trainer.prefill.prefill([range(5, 40)])
        again = loaded.prefill.prefill([range(5, 40)])
    for mine, theirs in zip(trained.keys, again.keys, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
