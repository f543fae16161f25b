"""Bases and decoders on disk, as training would have left them, made without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.core.conversations import packed_logits, prefill_batch
from tests.training import tiny
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from prefillshare_train.core.contract import Contract, cache_config, weights_fingerprint
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.data import Renderer, make_renderer

HUB_BASE = "made/base-135m"
PROMPT = (40, 41, 42, 43, 44)
ANSWER = (50, 51, 52)


def perturb(model: nn.Module, seed: int = 1, scale: float = 0.2) -> None:
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * drawn).to(parameter.dtype))


def renderer_of(base: Path) -> Renderer:
    return make_renderer(AutoTokenizer.from_pretrained(base))


def contract_of(base: Path, model: PreTrainedModel, **values: Any) -> Contract:
    """The contract of a decoder over this base."""
    return Contract(
        **{
            "base_id": str(base),
            "base_revision": None,
            "base_fingerprint": weights_fingerprint(model),
            "cache_config": cache_config(model.config),
            "prompt": renderer_of(base).prompt_contract(),
            "boundary": "last_token",
            "kv_dtype": str(model.dtype).removeprefix("torch."),
            **values,
        }
    )


def save_decoder(
    folder: Path,
    base: Path,
    *,
    lora: dict[str, Any] | None = None,
    vocabulary: int | None = None,
    **contract: Any,
) -> Path:
    """A decoder over `base` in `folder`.

    Args:
        lora: fields of `LoraConfig`; a full decoder where None.
        vocabulary: resize a full decoder's embeddings to so many rows.
        **contract: fields of its contract.
    """
    model = load_causal_lm(str(base), dtype=torch.float32)
    made = contract_of(base, model, adapter="none" if lora is None else "lora", **contract)
    decoder: Any = model
    if lora is not None:
        settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        decoder = get_peft_model(model, LoraConfig(**settings))
    elif vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    perturb(decoder)
    folder.mkdir(parents=True)
    decoder.save_pretrained(folder)
    renderer_of(base).saved_tokenizer().save_pretrained(folder)
    made.save(folder)
    return folder


def save_base(folder: Path) -> Path:
    """The tiny base with its tokenizer."""
    return tiny.save_base(folder)


def give_templates(base: Path, *names: str) -> None:
    """Several chat templates for a base, no two of them equal."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = tokenizer.chat_template
    tokenizer.chat_template = {name: f"{own}{{# {name} #}}" for name in names}
    tokenizer.save_pretrained(base)


def conditioned_logits(
    folder: Path, prompt: Sequence[int] = PROMPT, header: int = 1
) -> torch.Tensor:
    """Logits of the answer's tokens over the base's cache, as in training."""
    loaded = load_decoder(folder, dtype=torch.float32)
    ids = (*prompt, *ANSWER)
    row = Conversation(ids, (Turn(len(prompt), len(ids), header),))
    batch = pack([row], loaded.contract.rule)
    with torch.no_grad():
        return packed_logits(loaded.decoder, batch, prefill_batch(loaded.prefill, batch))
