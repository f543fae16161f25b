"""A base, decoders over it whose answers tell how much of a prompt they shared, and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from prefillshare_train.core.contract import Contract, cache_config, weights_fingerprint
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import PrefillModule, empty_cache, load_causal_lm

FULL = ("ada", "bob")
LORA = ("lora-ada", "lora-bob")
TOKENS = 12
"""How many tokens an answer has."""


@dataclass
class Models:
    """Folders, and what their models answer.

    Attributes:
        base: folder of the base.
        base_fingerprint: of its weights.
        folders: decoders by name; `FULL` have full weights and `LORA` are adapters.
        tokenizer: the base's.
    """

    base: Path
    base_fingerprint: str
    folders: dict[str, Path]
    tokenizer: Any
    _loaded: dict[str, nn.Module] = field(default_factory=dict)
    _prefills: dict[str, PrefillModule] = field(default_factory=dict)
    _answers: dict[Any, list[int]] = field(default_factory=dict)

    def answer(
        self, name: str, prompt: Sequence[int], *, shared: int | None = None, tokens: int = TOKENS
    ) -> list[int]:
        """What a decoder answers greedily, by `core.generate` in float32.

        Args:
            name: a decoder, or `base` for the base alone.
            shared: prompt tokens whose K/V come from the base; all but the last where None.
            tokens: length of the answer; nothing else ends it.
        """
        held = len(prompt) - 1 if shared is None else shared
        return self.answers(name, [prompt], shared=[held], tokens=tokens)[0]

    def answers(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        *,
        shared: Sequence[int] | None = None,
        tokens: int = TOKENS,
    ) -> list[list[int]]:
        """As `answer`, for many prompts at once, which is far quicker."""
        held = shared or [len(prompt) - 1 for prompt in prompts]
        keys = [(name, tuple(p), h, tokens) for p, h in zip(prompts, held, strict=True)]
        missing = [key for key in dict.fromkeys(keys) if key not in self._answers]
        if missing:
            decoder, prefill = self._load(name)
            asked = [list(key[1]) for key in missing]
            beginnings = [list(key[1][: key[2]]) for key in missing]
            cache = (
                prefill.prefill(beginnings)
                if any(beginnings)
                else empty_cache((0,) * len(asked), prefill.causal_lm)
            )
            found = generate(decoder, cache, asked, max_new_tokens=tokens, stop_ids=())
            self._answers |= dict(zip(missing, found, strict=True))
        return [self._answers[key] for key in keys]

    def answers_by_sharing(self, name: str, prompt: Sequence[int], block: int) -> dict[str, Any]:
        """Answers that tell apart who prefilled what."""
        held = [0, (len(prompt) - 1) // block * block, len(prompt) - 1]
        alone, blocks, whole = self.answers(name, [prompt] * 3, shared=held)
        return {
            "base alone": self.answer("base", prompt),
            "decoder alone": alone,
            "whole blocks": blocks,
            "all but the last": whole,
        }

    def _load(self, name: str) -> tuple[nn.Module, PrefillModule]:
        if name not in self._loaded:
            if name == "base":
                model = load_causal_lm(str(self.base), dtype=torch.float32).eval()
                self._loaded[name], self._prefills[name] = model, PrefillModule(model)
            else:
                loaded = load_decoder(self.folders[name], dtype=torch.float32)
                self._loaded[name], self._prefills[name] = loaded.decoder, loaded.prefill
        return self._loaded[name], self._prefills[name]


def make_models(base: Path, folder: Path) -> Models:
    """Write two full decoders and two adapters over a base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_causal_lm(str(base), dtype=torch.float32)
    fingerprint = weights_fingerprint(model)
    folders = {}
    for seed, name in enumerate(FULL):
        decoder = load_causal_lm(str(base), dtype=torch.float32)
        move(decoder, seed=seed, scale=0.12)
        folders[name] = _save(folder / name, decoder, tokenizer, contract(base, model, fingerprint))
    for seed, name in enumerate(LORA):
        settings = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)  # PEFT draws half of an adapter's matrices
        adapted = get_peft_model(load_causal_lm(str(base), dtype=torch.float32), settings)
        move(adapted, seed=10 + seed, scale=0.03, absolute=True)
        made = contract(base, model, fingerprint, adapter="lora")
        folders[name] = _save(folder / name, adapted, tokenizer, made)
    return Models(base, fingerprint, folders, tokenizer)


def contract(base: Path, model: PreTrainedModel, fingerprint: str, **values: Any) -> Contract:
    """A contract over the base."""
    settings: dict[str, Any] = {
        "base_id": str(base),
        "base_revision": None,
        "base_fingerprint": fingerprint,
        "cache_config": cache_config(model.config),
        "prompt": {},
        "boundary": "last_token",
        "kv_dtype": "float32",
    }
    return Contract(**(settings | values))


def move(model: nn.Module, *, seed: int, scale: float, absolute: bool = False) -> None:
    """Move every trainable matrix, by a share of its own spread or by an absolute amount."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                size = scale if absolute else scale * float(parameter.std())
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def _save(folder: Path, model: Any, tokenizer: Any, made: Contract) -> Path:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made.save(folder)
    return folder
