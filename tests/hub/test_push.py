"""Pushing to a hub on localhost: what arrives, what a broken line does, who may see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
import yaml
from tests.hub import decoders
from tests.hub.stub_hub import StubHub, stub_hub

from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, export_decoder
from prefillshare_train.hub.model import PrefillShareModel
from prefillshare_train.hub.push import PushOptions, publish_decoder, push_decoder

NAME = "someone/tools"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    with stub_hub() as hub:
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


@pytest.fixture(scope="module")
def exported(base: Path) -> Path:
    folder = decoders.save_decoder(base.parent / "decoder", base, lora={})
    options = ExportOptions(base_id=decoders.HUB_BASE)
    return export_decoder(folder, base.parent / "exported", options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_arrives_private_in_one_commit_and_loads(
    hub: StubHub, base: Path, exported: Path
) -> None:
    address = push_decoder(exported, NAME, PushOptions(message="First"))
    repo = hub.repos[NAME]
    assert repo.private
    assert repo.branches == {"main": contents(exported)}
    assert [commit["summary"] for commit in repo.commits] == ["First"]
    assert address.startswith(f"{hub.url}/{NAME}/commit/")
    card = yaml.safe_load(repo.branches["main"]["README.md"].decode().split("---")[1])
    assert card["base_model"] == decoders.HUB_BASE
    model = PrefillShareModel.from_pretrained(NAME, base=str(base))
    ids = torch.tensor([[40, 41, 42]])
    local = PrefillShareModel.from_pretrained(exported, base=str(base))
    assert torch.equal(model.generate(ids), local.generate(ids))


def test_pushing_again_sends_and_changes_nothing(hub: StubHub, exported: Path) -> None:
    push_decoder(exported, NAME, PushOptions())
    sent = hub.count("PUT", "/lfs/")
    push_decoder(exported, NAME, PushOptions())
    assert hub.count("PUT", "/lfs/") == sent == 1
    assert len(hub.repos[NAME].commits) == 1


def test_a_branch_is_made_and_main_is_left_alone(hub: StubHub, exported: Path) -> None:
    push_decoder(exported, NAME, PushOptions(revision="v2"))
    push_decoder(exported, NAME, PushOptions(revision="v2"))
    assert hub.repos[NAME].branches == {"main": {}, "v2": contents(exported)}


@pytest.mark.parametrize("status", [0, 500, 503], ids=["line cut", "500", "503"])
def test_short_faults_are_ridden_out(hub: StubHub, exported: Path, status: int) -> None:
    hub.fail("PUT", "/lfs/", status, times=2)
    push_decoder(exported, NAME, PushOptions())
    assert hub.count("PUT", "/lfs/") == 3
    assert hub.repos[NAME].branches["main"] == contents(exported)


@pytest.mark.parametrize("status", [0, 500], ids=["line cut", "500"])
def test_a_push_that_broke_off_goes_on(
    hub: StubHub, base: Path, tmp_path: Path, status: int
) -> None:
    folder = decoders.save_decoder(tmp_path / "full", base)
    options = ExportOptions(base_id=decoders.HUB_BASE, shard_size="30KB")
    out = export_decoder(folder, tmp_path / "out", options)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 1
    hub.fail("POST", "/commit/", status)
    with pytest.raises(HubError, match="Run the same command again"):
        push_decoder(out, NAME, PushOptions())
    assert hub.repos[NAME].branches["main"] == {}, "nothing shows before everything is there"
    assert hub.count("PUT", "/lfs/") == len(shards)
    push_decoder(out, NAME, PushOptions())
    assert hub.count("PUT", "/lfs/") == len(shards), "weights that arrived are not sent twice"
    assert hub.repos[NAME].branches["main"] == contents(out)


def test_what_broke_off_is_told(hub: StubHub, exported: Path) -> None:
    hub.fail("PUT", "/lfs/", 500, times=99)
    with pytest.raises(HubError, match=f"{WEIGHTS}.*500.*Run the same command again"):
        push_decoder(exported, NAME, PushOptions())
    assert hub.repos[NAME].branches["main"] == {}
    hub.faults.clear()
    hub.fail("POST", "/api/repos/create", 403)
    with pytest.raises(HubError, match="hf auth login"):
        push_decoder(exported, "another/tools", PushOptions())


def test_weights_of_an_earlier_push_do_not_stay(
    hub: StubHub, base: Path, exported: Path, tmp_path: Path
) -> None:
    push_decoder(exported, NAME, PushOptions())
    hub.repos[NAME].branches["main"]["notes.md"] = b"mine"
    folder = decoders.save_decoder(tmp_path / "full", base)
    options = ExportOptions(base_id=decoders.HUB_BASE)
    out = export_decoder(folder, tmp_path / "out", options)
    push_decoder(out, NAME, PushOptions())
    files = hub.repos[NAME].branches["main"]
    assert files == {**contents(out), "notes.md": b"mine"}
    assert "adapter_config.json" not in files


def test_several_templates_arrive_and_do_not_stay(
    hub: StubHub, exported: Path, tmp_path: Path
) -> None:
    base = decoders.save_base(tmp_path / "base")
    decoders.give_templates(base, "default", "tool_use")
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    options = ExportOptions(base_id=decoders.HUB_BASE)
    out = export_decoder(folder, tmp_path / "out", options)
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("mine")
    push_decoder(out, NAME, PushOptions())
    (out / ".git" / "config").unlink()
    assert "additional_chat_templates/tool_use.jinja" in hub.repos[NAME].branches["main"]
    assert hub.repos[NAME].branches["main"] == contents(out)
    loaded = PrefillShareModel.from_pretrained(NAME, base=str(base))
    assert loaded.contract == Contract.load(out)
    hub.repos[NAME].branches["main"]["mine/notes.jinja"] = b"mine"
    push_decoder(exported, NAME, PushOptions())
    files = hub.repos[NAME].branches["main"]
    assert files == {**contents(exported), "mine/notes.jinja": b"mine"}


def test_a_public_repository_needs_the_word(hub: StubHub, exported: Path) -> None:
    push_decoder(exported, NAME, PushOptions(public=True))
    assert not hub.repos[NAME].private
    with pytest.raises(HubError, match="add --public"):
        push_decoder(exported, NAME, PushOptions())


def test_a_base_that_nobody_else_knows_is_refused(hub: StubHub, base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    out = export_decoder(folder, tmp_path / "out", ExportOptions())
    with pytest.raises(HubError, match="--base owner/name"):
        push_decoder(out, NAME, PushOptions())
    assert not hub.requests


def test_a_folder_that_cannot_be_written_to_is_told(
    hub: StubHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={}, base_id=decoders.HUB_BASE)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(HubError, match=rf"{tmp_path} cannot be written to.*Permission denied"):
        publish_decoder(folder, NAME, ExportOptions(), PushOptions())
    assert not hub.requests


def test_offline_is_told_before_anything_is_asked(
    hub: StubHub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push_decoder(exported, NAME, PushOptions())
    with pytest.raises(HubError, match="could not be had from the hub"):
        PrefillShareModel.from_pretrained("someone/else")
    assert not hub.requests


def test_a_repository_without_a_decoder_is_refused(hub: StubHub, exported: Path) -> None:
    push_decoder(exported, NAME, PushOptions())
    del hub.repos[NAME].branches["main"]["prefillshare_contract.json"]
    with pytest.raises(ValueError, match="not a decoder trained by this library"):
        PrefillShareModel.from_pretrained(NAME)
    with pytest.raises(HubError, match="could not be had"):
        PrefillShareModel.from_pretrained("someone/missing")


def test_the_revision_of_a_decoder_is_read(hub: StubHub, base: Path, exported: Path) -> None:
    push_decoder(exported, NAME, PushOptions(revision="v2"))
    text = hub.repos[NAME].branches["v2"]["prefillshare_contract.json"]
    hub.repos[NAME].branches["v2"]["prefillshare_contract.json"] = json.dumps(
        {**json.loads(text), "boundary": "ratio:0.5"}
    ).encode()
    model = PrefillShareModel.from_pretrained(NAME, revision="v2", base=str(base))
    assert model.contract.boundary == "ratio:0.5"
    assert Contract.load(exported).boundary == "last_token"
