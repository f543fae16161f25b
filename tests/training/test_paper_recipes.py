"""The paper's grid: every model, task, adapter and method composes and passes a dry run offline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from tests.data.helpers import tiny_tokenizer, write_jsonl
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.training.dry_run import dry_run_report
from prefillshare_train.training.recipe import LoadedRecipe, RecipeError, load_recipe
from prefillshare_train.training.run import make_contract, prepare_data

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MODELS, TASKS, ADAPTERS = (
    sorted(path.stem for path in (RECIPES / kind).glob("*.yaml"))
    for kind in ("models", "tasks", "adapters")
)
METHODS = ("prefillshare", "full_prompt")
HUB_MODELS: dict[str, type[PreTrainedConfig]] = {
    "meta-llama/Llama-3.1-8B": LlamaConfig,
    "Qwen/Qwen3-1.7B-Base": Qwen3Config,
    "Qwen/Qwen3-8B-Base": Qwen3Config,
    "Qwen/Qwen3-14B-Base": Qwen3Config,
}
PARAMETER = {"type": "str", "description": "a place", "default": ""}
ROWS = {
    "meta-math/MetaMathQA-40K": {"query": "What is {n} + 1?", "response": "The answer is: {n}"},
    "nickrosh/Evol-Instruct-Code-80k-v1": {"instruction": "Print {n}.", "output": "print({n})"},
    "Salesforce/xlam-function-calling-60k": {
        "query": "Weather in town {n}?",
        "tools": json.dumps(
            [{"name": "weather", "description": "it", "parameters": {"town": PARAMETER}}]
        ),
        "answers": json.dumps([{"name": "weather", "arguments": {"town": "{n}"}}]),
    },
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe part that names a local copy of everything that the grid takes from the hub."""
    folder = tmp_path_factory.mktemp("hub")
    copies: dict[str, str] = {}
    for name, kind in HUB_MODELS.items():
        place = folder / name
        llama = kind is LlamaConfig
        tokenizer = tiny_tokenizer(None, bos="<s>" if llama else None, adds_bos=llama)
        config = kind(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            eos_token_id=tokenizer.eos_token_id,
        )
        config.save_pretrained(place)
        tokenizer.save_pretrained(place)
        copies[name] = str(place)
    for name, row in ROWS.items():
        rows = [{key: text.replace("{n}", str(n)) for key, text in row.items()} for n in range(9)]
        copies[name] = str(write_jsonl(folder / name / "train.jsonl", rows).parent)
    part = folder / "offline.yaml"
    part.write_text(yaml.safe_dump({"local_copies": copies}))
    return part


GRID = list(itertools.product(MODELS, TASKS, ADAPTERS, METHODS))


def compose(offline: Path, model: str, task: str, adapter: str, *overrides: str) -> LoadedRecipe:
    parts = [RECIPES / "models" / model, RECIPES / "tasks" / task, RECIPES / "adapters" / adapter]
    # A byte is a token to the stand-ins' tokenizer, so prompts are several times their real length.
    return load_recipe(
        [*(f"{part}.yaml" for part in parts), offline], ["data.max_length=4096", *overrides]
    )


def test_the_grid_is_the_papers() -> None:
    assert set(MODELS) == {"llama3.1-8b", "qwen3-1.7b", "qwen3-8b", "qwen3-14b"}
    assert set(TASKS) == {"math", "code", "tools"}
    assert set(ADAPTERS) == {"full", "lora"}


@pytest.mark.parametrize(("model", "task", "adapter", "method"), GRID)
def test_every_run_of_the_grid_passes_a_dry_run(
    offline: Path, model: str, task: str, adapter: str, method: str
) -> None:
    loaded = compose(offline, model, task, adapter, f"method={method}")
    arguments = loaded.recipe.training_arguments()
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.1, 0.0)
    assert dry_run_report(loaded).endswith("dry run ok")


def test_no_two_runs_share_a_folder(offline: Path) -> None:
    folders = {
        compose(offline, model, task, adapter, f"method={method}").recipe.training["output_dir"]
        for model, task, adapter, method in GRID
    }
    assert len(folders) == len(GRID)


def test_a_local_copy_leaves_the_hub_id_in_the_contract(offline: Path) -> None:
    loaded = compose(offline, "qwen3-1.7b", "math", "full")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(loaded.recipe.base_location)
    )
    contract = make_contract(loaded.recipe, model, prepare_data(loaded), "sha256:0")
    assert contract.base_id == "Qwen/Qwen3-1.7B-Base"


@pytest.mark.parametrize("model", MODELS)
def test_decoders_of_one_base_share_a_template(offline: Path, model: str) -> None:
    contracts = [
        prepare_data(compose(offline, model, task, "lora")).renderer.prompt_contract()
        for task in TASKS
    ]
    assert contracts[0] == contracts[1] == contracts[2]


def test_llama_prompts_have_one_bos_and_end_on_the_header(offline: Path) -> None:
    data = prepare_data(compose(offline, "llama3.1-8b", "tools", "full"))
    (turn,) = data.train[0].turns
    prompt = data.renderer.decode(data.train[0].token_ids[: turn.prompt_length])
    assert prompt.startswith("<s><|start_header_id|>system")
    assert prompt.count("<s>") == 1
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "<tool_call>" in data.renderer.decode(data.train[0].token_ids[turn.prompt_length :])


def test_the_estimate_compares_the_parallel_configurations(offline: Path) -> None:
    parts = ("models/llama3.1-8b", "tasks/tools", "adapters/full")
    files = [*(str(RECIPES / f"{part}.yaml") for part in parts), str(offline)]
    options = ["data.max_length=4096", "training.peak_tflops=100", "--gpus", "4"]
    result = CliRunner().invoke(app, ["estimate", *files, *options])
    assert result.exit_code == 0, result.output
    table = {line[:24].strip(): line[24:].split() for line in result.output.splitlines()}
    (names,) = [line.split() for line in result.output.splitlines() if "zero3_offload" in line]
    assert names == ["one_gpu", "ddp", "zero2", "fsdp2", "zero3", "zero3_offload"]
    assert len(table["together"]) == len(names)
    assert "each of 4 GPUs" in result.output
    assert "h at 40% of 100" in result.output


def test_the_command_passes_and_a_missing_copy_is_named(offline: Path, tmp_path: Path) -> None:
    parts = ("models/qwen3-8b", "tasks/math", "adapters/lora")
    files = [str(RECIPES / f"{part}.yaml") for part in parts]
    result = CliRunner().invoke(app, ["train", *files, str(offline), "--dry-run"])
    assert result.exit_code == 0, result.output
    (tmp_path / "moved.yaml").write_text("local_copies: {Qwen/Qwen3-8B-Base: /nowhere/qwen}\n")
    with pytest.raises(RecipeError, match=r"local_copies: /nowhere/qwen, given for Qwen/Qwen3-8B"):
        load_recipe([*files, tmp_path / "moved.yaml"])
