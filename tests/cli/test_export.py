"""`prefillshare export` as a person types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub import decoders
from tests.hub.stub_hub import stub_hub
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.push import hub_target

runner = CliRunner()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder with its finished decoder."""
    base = decoders.save_base(tmp_path / "base")
    decoders.save_decoder(tmp_path / "run" / "decoder", base, lora={}, boundary="generation_prompt")
    return tmp_path / "run"


def run(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_run_becomes_each_kind_of_decoder(run_folder: Path, tmp_path: Path) -> None:
    for name, options in {
        "hf": (),
        "alora": ("--format", "alora"),
        "merged": ("--merge", "--dtype", "bfloat16", "--shard-size", "30KB"),
    }.items():
        code, output = run(run_folder, "--to", tmp_path / name, *options)
        assert code == 0, output
        assert f"decoder: {tmp_path / name}" in output.replace("\n", "")
    assert Contract.load(tmp_path / "merged").adapter == "none"
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    assert '"alora_invocation_tokens": [' in (tmp_path / "alora/adapter_config.json").read_text()


def test_faults_are_told_in_one_line(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.md").write_text("mine")
    for arguments, message in (
        (("--to", tmp_path / "taken"), "already holds notes.md"),
        (("--to", tmp_path / "out", "--merge", "--format", "alora"), "choose one of the two"),
        (("--to", "someone/tools"), "--base owner/name"),
        (("--to", "hf://tools"), "give hf://owner/name"),
        (("--to", tmp_path / "out", "--evaluation", tmp_path), "is no evaluation"),
        (("--to", tmp_path / "taken" / "notes.md" / "out"), "Not a directory"),
        (("--to", tmp_path / "out", "--dtype", "bfloat16"), "Add --merge"),
    ):
        code, output = run(run_folder, *arguments)
        assert code == 2
        assert message in output
        assert "Traceback" not in output
    assert {p.name for p in tmp_path.iterdir()} == {"base", "run", "taken"}


def test_a_folder_and_a_hub_id_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    targets = {
        "someone/tools": "someone/tools",
        "runs/tools": None,
        "hf://runs/tools": "runs/tools",
        "./someone/tools": None,
        "/someone/tools": None,
        "tools": None,
        "a/b/c": None,
    }
    assert {text: hub_target(text) for text in targets} == targets
    with pytest.raises(HubError, match="hf://owner/name"):
        hub_target("hf://a/b/c")


def test_pushing_through_the_environment_of_a_user(run_folder: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT is read at import: a process of its own."""
    with stub_hub() as hub:
        hub.fail("POST", "/commit/", 500)
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_made_up",
        }
        command = [
            *(sys.executable, "-c", "from prefillshare_train.cli.main import main; main()"),
            *("export", str(run_folder), "--to", "someone/tools", "--base", decoders.HUB_BASE),
        ]
        done = [
            subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            for _ in range(2)
        ]
        assert done[0].returncode == 2
        assert "Run the same command again" in done[0].stderr
        assert "pushing to someone/tools (private)" in done[1].stderr
        assert done[1].returncode == 0, done[1].stderr
        assert re.fullmatch(rf"{hub.url}/someone/tools/commit/\w+\n", done[1].stdout)
        repo = hub.repos["someone/tools"]
        assert repo.private
        assert hub.count("PUT", "/lfs/") == 1, "exporting again writes the same bytes"
        assert 'from_pretrained("someone/tools")' in repo.branches["main"]["README.md"].decode()
    assert {p.name for p in run_folder.iterdir()} == {"decoder"}, "nothing stays on disk"
