"""What is exported loads back and computes the same; the rest is refused and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.core.conversations import packed_logits, prefill_batch
from tests.data.helpers import CHATML
from tests.hub import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import add_adapter, load_decoder
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.data import DataError
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, export_decoder
from prefillshare_train.hub.model import PrefillShareModel

PROMPT = [40, 41, 42, 43, 44]
ANSWER = [50, 51, 52]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


def conditioned_logits(folder: Path, prompt: list[int] = PROMPT, header: int = 1) -> torch.Tensor:
    """Logits of the answer's tokens over the base's cache, as in training."""
    loaded = load_decoder(folder, dtype=torch.float32)
    ids = (*prompt, *ANSWER)
    row = Conversation(ids, (Turn(len(prompt), len(ids), header),))
    batch = pack([row], loaded.contract.rule)
    with torch.no_grad():
        return packed_logits(loaded.decoder, batch, prefill_batch(loaded.prefill, batch))


def first_logits(decoder: Any, cache: PromptCache, prompt: list[int]) -> torch.Tensor:
    """Scores of the first token of an answer, as `generate` sees them."""
    seen: list[torch.Tensor] = []

    def keep(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return scores

    processors = LogitsProcessorList([keep])
    generate(decoder, cache, [prompt], max_new_tokens=1, stop_ids=(), processors=processors)
    return seen[0]


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


# -- aLoRA ----------------------------------------------------------------------------------------


def alora_decoder(tmp_path: Path, base: Path, **options: Any) -> Path:
    values = {"boundary": "generation_prompt", "lora": {}, **options}
    return decoders.save_decoder(tmp_path / "decoder", base, **values)


def test_stock_peft_computes_what_the_decoder_does(base: Path, tmp_path: Path) -> None:
    folder = alora_decoder(tmp_path, base)
    out = export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))
    renderer = decoders.renderer_of(base)
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "And that?"},
    ]
    prompt = renderer.prompt_ids(messages)
    header = renderer.encode(["<|im_start|>assistant\n"])[0]
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] == header
    back = export_decoder(out, tmp_path / "back", ExportOptions())
    settings = json.loads((back / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] is None

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([[*prompt, *ANSWER]])).logits[0]
    ours = conditioned_logits(folder, prompt, len(header))
    scale = ours.abs().max().item()
    torch.testing.assert_close(logits[len(prompt) - 1 : -1], ours, rtol=0, atol=1e-5 * scale)
    ids = torch.tensor([prompt])
    tokens = stock.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        PrefillShareModel.from_pretrained(folder).generate(ids, max_new_tokens=12), tokens
    )

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    with torch.no_grad():
        whole = plain.eval()(input_ids=torch.tensor([[*prompt, *ANSWER]])).logits[0]
    assert (whole[len(prompt) - 1 : -1] - ours).abs().max() > 1e-2 * scale


def test_our_loaders_run_an_alora_as_the_decoder_that_it_is(base: Path, tmp_path: Path) -> None:
    folder = alora_decoder(tmp_path, base)
    out = export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))
    header = decoders.renderer_of(base).encode(["<|im_start|>assistant\n"])[0]
    prompt = [*PROMPT, *header]
    loaded = load_decoder(folder)
    cache = loaded.prefill.prefill([prompt[: -len(header)]])
    expected = first_logits(loaded.decoder, cache, prompt)
    plain = loaded.prefill.model
    with loaded.prefill.base_weights():
        assert not torch.equal(first_logits(plain, cache, prompt), expected), "the adapter acts"
    assert torch.equal(first_logits(load_decoder(out).decoder, cache, prompt), expected)
    second = load_decoder(
        decoders.save_decoder(tmp_path / "first", base, lora={"r": 2}, boundary="generation_prompt")
    )
    add_adapter(second, out, "alora")
    second.decoder.set_adapter("alora")
    several = DecoderSet(str(base), {"plain": tmp_path / "first", "alora": out})
    several.lora.set_adapter(several.adapters["alora"])
    for decoder in (second.decoder, several.lora):
        assert torch.equal(first_logits(decoder, cache, prompt), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": "last_token"}, "boundary rule is last_token"),
        ({"boundary": "block_aligned:16"}, "boundary rule is block_aligned:16"),
        ({"boundary": "ratio:0.5"}, "boundary rule is ratio:0.5"),
        ({"method": "full_prompt"}, "reads its own prompts"),
        ({"lora": None}, "fully trained"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save is \\['lm_head'\\]"),
        ({"lora": {"trainable_token_indices": [5]}}, "trainable_token_indices"),
        ({"lora": {"use_dora": True}}, "use_dora"),
        ({"lora": {"bias": "lora_only"}}, "bias is 'lora_only'"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, "adapts an embedding"),
    ],
    ids=str,
)
def test_an_adapter_that_is_no_alora_is_refused_by_name(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = alora_decoder(tmp_path, base, **options)
    with pytest.raises(HubError, match=message):
        export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))
    assert {path.name for path in tmp_path.iterdir()} == {"decoder"}


def with_template(tmp_path: Path, template: str) -> Path:
    base = decoders.save_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    return base


def test_one_header_token_makes_last_token_an_alora(tmp_path: Path) -> None:
    base = with_template(
        tmp_path, CHATML.replace("<|im_start|>assistant\n' if", "<|im_start|>' if")
    )
    folder = alora_decoder(tmp_path, base, boundary="last_token")
    out = export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))
    assert (
        len(json.loads((out / "adapter_config.json").read_text())["alora_invocation_tokens"]) == 1
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.split("{{- '<|im_start|>assistant")[0], "no assistant header"),
        # "\n\n" is one token: after a message that ends in a line break the header merges with it.
        (
            "{%- for m in messages -%}{{- m.content -}}{%- endfor -%}"
            "{{- '\nA:' if add_generation_prompt -}}",
            "not the same in every|merges",
        ),
    ],
)
def test_a_header_without_fixed_tokens_is_refused(
    tmp_path: Path, template: str, message: str
) -> None:
    base = with_template(tmp_path, template)
    folder = alora_decoder(tmp_path, base)
    with pytest.raises(HubError, match=message):
        export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))


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


def test_nothing_is_left_when_writing_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoders.save_decoder(tmp_path / "decoder", base)
    (tmp_path / "out").mkdir()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prefillshare_train.hub.export.write_card", full_disk)
        with pytest.raises(OSError, match="No space"):
            export_decoder(folder, tmp_path / "out", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"decoder", "out"}
    assert not files(tmp_path / "out")
    export_decoder(folder, tmp_path / "out", ExportOptions())
    with pytest.raises(HubError, match="already holds"):
        export_decoder(folder, tmp_path / "out", ExportOptions())


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
