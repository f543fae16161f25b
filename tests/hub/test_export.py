"""What is exported loads back and computes the same; the rest is refused and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.hub import decoders
from tests.hub.decoders import PROMPT, conditioned_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.data import DataError, saved_renderer
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, export_decoder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


LORA_KINDS: dict[str, dict[str, Any]] = {
    "all_linear": {},
    "head_saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "embedding_saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "both_saved": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["k_proj"]},
    "some_tokens": {"trainable_token_indices": [50, 51], "target_modules": ["q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("kind", LORA_KINDS)
def test_a_lora_decoder_loads_back_with_equal_logits(
    base: Path, tmp_path: Path, kind: str, merge: bool
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora=LORA_KINDS[kind])
    out = export_decoder(folder, tmp_path / "out", ExportOptions(merge=merge))
    expected, found = conditioned_logits(folder), conditioned_logits(out)
    plain = conditioned_logits(decoders.save_decoder(tmp_path / "none", base, lora={"r": 1}))
    assert (plain - expected).abs().max() > 0.1, "the adapter matters"
    if merge:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert Contract.load(out).adapter == "none"
        assert not files(out) & {"adapter_config.json", "adapter_model.safetensors"}
        stock = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert stock.config.use_cache
        assert stock.generation_config.eos_token_id == 2
    else:
        assert torch.equal(found, expected)
        assert Contract.load(out) == Contract.load(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_full_decoder_with_a_resized_vocabulary_in_shards(
    base: Path, tmp_path: Path, tied: bool
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, vocabulary=300)
    if not tied:
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(300, 32)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = export_decoder(folder, tmp_path / "out", ExportOptions(shard_size="30KB"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {out.stat().st_mode & 0o666}, "others may read the weights too"
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    assert torch.equal(conditioned_logits(out), conditioned_logits(folder))
    stock = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[*PROMPT, 299]])
    assert torch.equal(stock(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert stock.get_input_embeddings().num_embeddings == 300


def test_an_adapter_over_a_base_with_a_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    grown = load_causal_lm(str(base))
    grown.resize_token_embeddings(300)
    grown.save_pretrained(tmp_path / "grown")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "grown")
    lora = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    folder = decoders.save_decoder(tmp_path / "decoder", tmp_path / "grown", lora=lora)
    for merge in (False, True):
        out = export_decoder(folder, tmp_path / f"out-{merge}", ExportOptions(merge=merge))
        found = conditioned_logits(out, [*PROMPT, 299])
        expected = conditioned_logits(folder, [*PROMPT, 299])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_merge_rounds_the_float32_sum_once(base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    exact = export_decoder(folder, tmp_path / "exact", ExportOptions(merge=True))
    rounded = export_decoder(
        folder, tmp_path / "rounded", ExportOptions(merge=True, dtype="bfloat16")
    )
    expected, found = (load_file(f / "model.safetensors") for f in (exact, rounded))
    assert all(torch.equal(found[k], v.to(torch.bfloat16)) for k, v in expected.items())


def test_merging_needs_the_very_base(base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    other = load_causal_lm(str(base))
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save_pretrained(tmp_path / "other")
    options = ExportOptions(merge=True, base=str(tmp_path / "other"))
    with pytest.raises(ContractError, match="base fingerprint"):
        export_decoder(folder, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    options = ExportOptions(merge=True, base=str(tmp_path / "nowhere"))
    with pytest.raises(HubError, match=r"cannot be loaded.*--base-path"):
        export_decoder(folder, tmp_path / "out", options)


def test_the_base_gets_the_name_that_others_know(base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={}, base_revision="old")
    options = ExportOptions(base_id=decoders.HUB_BASE, base_revision="abc123")
    out = export_decoder(folder, tmp_path / "out", options)
    contract = Contract.load(out)
    assert (contract.base_id, contract.base_revision) == (decoders.HUB_BASE, "abc123")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == decoders.HUB_BASE
    assert settings["revision"] == "abc123"
    again = export_decoder(folder, tmp_path / "again", ExportOptions(base_id=decoders.HUB_BASE))
    assert Contract.load(again).base_revision is None, "a revision belongs to its own base"


def test_only_the_decoder_leaves(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = decoders.save_decoder(run / "decoder", base, lora={})
    for name in ("optimizer.safetensors", "training_args.json", "trainer_state.json", "notes.md"):
        (folder / name).write_text('{"log_history": []}')
    recipe = {
        "base": {"model": str(base)},
        "data": {"train": {"source": "/home/someone/rows.jsonl"}, "chat_template": "./a/b.jinja"},
        "training": {"output_dir": "/home/someone/run", "learning_rate": 1e-4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = export_decoder(run, tmp_path / "out", ExportOptions(base_id=decoders.HUB_BASE))
    assert files(out) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "prefillshare_contract.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert "/home/someone" not in path.read_text()
            assert str(base) not in path.read_text()
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == {
        "base": {"model": decoders.HUB_BASE},
        "data": {"train": {"source": "rows.jsonl"}, "chat_template": "b.jinja"},
        "training": {"learning_rate": 1e-4},
    }


def test_a_tokenizer_with_several_templates_keeps_them(tmp_path: Path) -> None:
    base = decoders.save_base(tmp_path / "base")
    decoders.give_templates(base, "default", "tool_use")
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    out = export_decoder(folder, tmp_path / "out", ExportOptions())
    trained = decoders.renderer_of(base)
    assert set(trained.template) == {"default", "tool_use"}
    assert saved_renderer(out, Contract.load(out).prompt).template == trained.template


# -- whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(merge=True), "leave --merge out"),
        (ExportOptions(format="alora"), "no adapter to write"),
    ],
)
def test_options_that_a_full_decoder_cannot_take(
    base: Path, tmp_path: Path, options: ExportOptions, message: str
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base)
    with pytest.raises(HubError, match=f"(?i){message}"):
        export_decoder(folder, tmp_path / "out", options)


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"base": "somewhere"}])
def test_options_of_merging_are_refused_without_it(
    base: Path, tmp_path: Path, lora: dict[str, Any] | None, option: dict[str, Any]
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora=lora)
    with pytest.raises(HubError, match=r"--(dtype bfloat16|base-path somewhere) is .* Add --merge"):
        export_decoder(folder, tmp_path / "out", ExportOptions(**option))
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_writing_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base)
    (tmp_path / "out").mkdir()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prefillshare_train.hub.export.write_card", full_disk)
        with pytest.raises(HubError, match=r"nothing was left there.*No space"):
            export_decoder(folder, tmp_path / "out", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"decoder", "out"}
    assert not files(tmp_path / "out")
    export_decoder(folder, tmp_path / "out", ExportOptions())
    with pytest.raises(HubError, match="already holds"):
        export_decoder(folder, tmp_path / "out", ExportOptions())


def test_a_place_below_a_file_is_told(base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    (tmp_path / "notes").write_text("mine")
    out = tmp_path / "notes" / "deep" / "out"
    with pytest.raises(HubError, match=rf"writing {out} failed.*Not a directory"):
        export_decoder(folder, out, ExportOptions())
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_checkpoint_that_does_not_load_back_is_not_exported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    plain = torch.nn.Module.state_dict

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = plain(self, *args, **kwargs)
        return {k: v + 1 if k == "model.norm.weight" else v for k, v in state.items()}

    monkeypatch.setattr(torch.nn.Module, "state_dict", spoiled)
    with pytest.raises(HubError, match="nothing was exported"):
        export_decoder(folder, tmp_path / "out", ExportOptions(merge=True))
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_changed_are_told(base: Path, tmp_path: Path) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base, lora={})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(HubError, match=r"no adapter_model\.safetensors"):
        export_decoder(folder, tmp_path / "out", ExportOptions())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(DataError, match="template_sha256"):
        export_decoder(folder, tmp_path / "out", ExportOptions())
    with pytest.raises(ContractError, match="no prefillshare_contract"):
        export_decoder(base, tmp_path / "out", ExportOptions())
