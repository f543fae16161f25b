"""The commands, as a person types them, on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.data.helpers import write_jsonl
from tests.training import tiny
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core.contract import ContractError
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.training.inspection import token_views
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import prepare_data

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, rows and a recipe."""
    tiny.save_base(tmp_path / "base")
    rows = [{"prompt": f"Say {n} again.", "completion": f"{n} and {n}."} for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        f"""
base: {{model: {tmp_path / "base"}, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: rows.jsonl}}, eval_fraction: 0.2}}
training:
  output_dir: {tmp_path / "run"}
  max_steps: 4
  save_steps: 2
  logging_steps: 1
  per_device_train_batch_size: 4
  report_to: none
  disable_tqdm: true
"""
    )
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_train_leaves_a_decoder_that_loads_over_its_base_only(folder: Path, adapter: str) -> None:
    recipe = folder / "recipe.yaml"
    code, output = run("train", recipe, f"decoder.adapter={adapter}")
    assert code == 0, output
    decoder = folder / "run" / "decoder"
    loaded = load_decoder(decoder)
    assert loaded.contract.adapter == adapter
    cache = loaded.prefill.prefill([[5, 6, 7]])
    answer = generate(loaded.decoder, cache, [[5, 6, 7, 8]], max_new_tokens=4, stop_ids=())
    assert len(answer[0]) == 4
    history = json.loads((decoder / "log_history.json").read_text())
    assert sum("loss" in entry for entry in history) == 4
    other = load_causal_lm(str(folder / "base"))
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.save_pretrained(folder / "moved")
    with pytest.raises(ContractError, match="base fingerprint"):
        load_decoder(decoder, base=str(folder / "moved"))

    code, output = run("train", recipe)
    assert code == 2
    assert "--resume" in output
    code, output = run("train", recipe, f"decoder.adapter={adapter}", "--resume")
    assert code == 0, output


@pytest.mark.parametrize("method", ["prefillshare", "full_prompt"])
def test_exact_match_is_measured_while_training(folder: Path, method: str) -> None:
    code, output = run(
        "train",
        folder / "recipe.yaml",
        f"method={method}",
        "training.generate_every=2",
        "training.generate_rows=3",
        "training.generate_max_new_tokens=5",
    )
    assert code == 0, output
    history = json.loads((folder / "run" / "decoder" / "log_history.json").read_text())
    measured = {e["step"]: e["eval_exact_match"] for e in history if "eval_exact_match" in e}
    assert measured.keys() == {2, 4}
    assert all(0 <= value <= 1 for value in measured.values())


def test_dry_run_touches_no_weights(folder: Path) -> None:
    (folder / "base" / "model.safetensors").unlink()
    code, output = run("train", folder / "recipe.yaml", "--dry-run")
    assert code == 0, output
    assert "dry run ok" in output
    assert "optimizer (AdamW)" in output
    assert not (folder / "run").exists()


def test_inspect_is_plain_text_when_piped(folder: Path) -> None:
    code, output = run("inspect", folder / "recipe.yaml", "--rows", 2)
    assert code == 0, output
    for part in ("[base]", "[decoder]", "[trained]", "prompt tokens:", "FLOPs of plain"):
        assert part in output
    assert "\x1b[" not in output


def test_inspect_tells_which_rows_are_dropped_and_why(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Say it. " * 200, "completion": "It."}) + "\n")
    code, output = run("inspect", folder / "recipe.yaml", "data.max_length=200")
    assert code == 0, output
    assert "1 overlong: longer than max_length" in output
    assert "rows.jsonl:41: prompt of" in output


def test_inspect_shows_what_rows_and_templates_hold_as_it_is(folder: Path) -> None:
    bad = "[/INST] :smile: [train]"
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Say it. " * 200, "completion": bad}) + "\n")
    code, output = run("inspect", folder / "recipe.yaml", "data.max_length=200")
    assert code == 0, output
    assert f"the response begins '{bad}" in output


def test_a_header_that_merges_is_told_before_weights_are_read(folder: Path) -> None:
    """`A:` is one token, so that a header of `:` is part of it after an A."""
    template = (
        "{%- for message in messages -%}"
        "{{- (':\n' if message.role == 'assistant' else '') + message.content -}}"
        "{{- eos_token if message.role == 'assistant' -}}{%- endfor -%}"
        "{{- ':\n' if add_generation_prompt -}}"
    )
    (folder / "colon.jinja").write_text(template)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / "base" / name).unlink(missing_ok=True)
    with (folder / "rows.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"prompt": f"{n}. Say A", "completion": "A."}) + "\n" for n in range(3)
        )
    overrides = ("data.chat_template=colon.jinja", "boundary=generation_prompt")
    code, output = run("train", folder / "recipe.yaml", "--dry-run", *overrides)
    assert code == 2
    assert "boundary generation_prompt: 3 of 43 prompts have no assistant header" in output
    assert "Say A:\\n'. Set boundary: last_token" in output
    assert "Traceback" not in output
    rule = "boundary=last_token"
    assert run("train", folder / "recipe.yaml", "--dry-run", *overrides, rule)[0] == 0


def test_half_a_character_is_told_with_its_line(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a\\ud83d", "completion": "b"}\n')
    code, output = run("train", folder / "recipe.yaml", "--dry-run")
    assert code == 2
    assert "rows.jsonl:41: message 1 holds half a surrogate pair" in output


def test_inspect_colours_what_each_model_runs(folder: Path) -> None:
    loaded = load_recipe([folder / "recipe.yaml"], [])
    data = prepare_data(loaded)
    (text,) = token_views(loaded.recipe, data, 1, marks=False)
    shown = {span.style: text.plain[span.start : span.end] for span in text.spans}
    turn = data.train[0].turns[0]
    ids = data.train[0].token_ids
    assert len(shown) == 3
    trained = data.renderer.decode(list(ids[turn.prompt_length : turn.end]))
    assert trained in shown.values()
    assert "[trained]" not in text.plain


def test_a_signal_ends_training_with_its_status_and_a_checkpoint(folder: Path) -> None:
    command = [sys.executable, "-c", "from prefillshare_train.cli.main import main; main()"]
    command += ["train", str(folder / "recipe.yaml"), "training.max_steps=5000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "run the same command with --resume" in errors
    assert list((folder / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_inspect_counts_checkpointing_under_both_of_its_names(folder: Path, name: str) -> None:
    def ratio(*overrides: str) -> float:
        code, output = run("inspect", folder / "recipe.yaml", *overrides)
        assert code == 0, output
        return float(output.split("on this data: ")[1].split()[0])

    assert ratio(f"training.{name}=true") > ratio()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("boundry=last_token", "Did you mean boundary?"),
        ("data.train.source=missing.jsonl", "missing.jsonl"),
        ("data.max_length=3", "overlong"),
        ("decoder.lora.rank=3", "decoder.lora"),
    ],
)
def test_mistakes_are_told_without_a_traceback(folder: Path, override: str, message: str) -> None:
    code, output = run("train", folder / "recipe.yaml", override)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
