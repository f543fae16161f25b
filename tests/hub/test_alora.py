"""The aLoRA format: stock PEFT computes what the decoder does, or the export is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.data.helpers import CHATML
from tests.hub import decoders
from tests.hub.decoders import ANSWER, PROMPT, conditioned_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import add_adapter, load_decoder
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.data import DataError
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, export_decoder
from prefillshare_train.hub.model import PrefillShareModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save_base(tmp_path_factory.mktemp("hub") / "base")


def first_logits(decoder: Any, cache: PromptCache, prompt: list[int]) -> torch.Tensor:
    """Scores of the first token of an answer, as `generate` sees them."""
    seen: list[torch.Tensor] = []

    def keep(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return scores

    processors = LogitsProcessorList([keep])
    generate(decoder, cache, [prompt], max_new_tokens=1, stop_ids=(), processors=processors)
    return seen[0]


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
    with pytest.raises(DataError, match=message):
        export_decoder(folder, tmp_path / "out", ExportOptions(format="alora"))
