"""The documents about checkpoints and migration name things that exist."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import typer
import yaml
from peft import LoraConfig
from tests.hub import decoders

from prefillshare_train.cli.export import export
from prefillshare_train.data import DataConfig, SourceConfig
from prefillshare_train.hub.generation import _TAKEN
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.recipe import BaseConfig, DecoderConfig, Recipe, parse_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHECKPOINTS = (DOCS / "checkpoints.md").read_text()
MIGRATING = (DOCS / "migrating.md").read_text()


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]


def table(title: str) -> list[tuple[list[str], list[str], str]]:
    """(their keys, our keys, remark) of each row of a section's table."""
    section = MIGRATING.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [
        (re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours), remark)
        for theirs, ours, remark in rows
    ]


SECTIONS = ["TRL `SFTTrainer`", "PEFT aLoRA", "axolotl", "LLaMA-Factory"]


@pytest.mark.parametrize("title", SECTIONS)
def test_our_keys_are_those_of_a_recipe(title: str) -> None:
    ours = {key for _, keys, _ in table(title) for key in keys if " " not in key}
    assert len(ours) >= 2
    ours |= set(re.findall(r"`((?:base|data|decoder|training)\.[\w.]+)[:`]", MIGRATING))
    known = names(Recipe)
    for prefix, kind in {
        "base": BaseConfig,
        "decoder": DecoderConfig,
        "data": DataConfig,
        "data.train": SourceConfig,
        "training": CacheConditionedConfig,
    }.items():
        known |= {f"{prefix}.{name}" for name in names(kind)}
    assert ours <= known


def test_lora_settings_in_remarks_are_pefts() -> None:
    for title in SECTIONS:
        for _, ours, remark in table(title):
            if ours == ["decoder.lora"]:
                named = set(re.findall(r"`(\w+)`", remark)) - {"all", "alora_invocation_tokens"}
                assert named <= names(LoraConfig)


def test_trls_keys_are_trls() -> None:
    trl = pytest.importorskip("trl")
    known = names(trl.SFTConfig) | set(inspect.signature(trl.SFTTrainer.__init__).parameters)
    theirs = {key for keys, _, _ in table("TRL `SFTTrainer`") for key in keys}
    assert theirs <= known
    own = names(trl.SFTConfig) - names(trl.SFTConfig.__mro__[1]) - names(CacheConditionedConfig)
    left_out = own - theirs
    assert left_out <= {"activation_offloading", "dataset_kwargs", "dataset_num_proc"} | {
        "router_aux_loss_coef"
    }, "each key that TRL adds has a row"


def test_the_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", MIGRATING, re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(text))
    recipe.training["use_cpu"] = True
    assert recipe.training_arguments().warmup_steps == 0.03


def test_options_are_those_of_the_command() -> None:
    command = typer.main.get_command(_app())
    known = {option for p in command.params for option in p.opts}
    for page in (CHECKPOINTS, MIGRATING):
        for line in page.replace("\\\n", " ").splitlines():
            if "prefillshare export" in line:
                assert set(re.findall(r"--[a-z][a-z0-9-]*", line)) <= known
    assert {"--public", "--revision", "--shard-size", "--merge"} <= known


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(export)
    return app


def test_generate_takes_what_the_page_says() -> None:
    for name in _TAKEN - {"eos_token_id", "pad_token_id"}:
        assert f"`{name}`" in CHECKPOINTS


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = decoders.save_base(tmp_path / "base")
    decoders.save_decoder(tmp_path / "runs/demo/tool_calling/decoder", base, lora={})
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", CHECKPOINTS, re.DOTALL):
        exec(block, scope)
    assert scope["answers"].shape[0] == 2  # type: ignore[attr-defined]
