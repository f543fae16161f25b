"""A tiny base with decoders of every kind, the engine over them, and what it must answer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.core import families
from tests.data.helpers import tiny_tokenizer
from tests.training import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessorList

from prefillshare_train.core.contract import Contract, cache_config, weights_fingerprint
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.data import make_renderer
from prefillshare_train.serving.api import Event, Generation, GenerationRequest, SamplingParams
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels

# name -> (adapter, boundary rule)
DECODERS = {
    "math": ("lora", "last_token"),
    "code": ("lora", "last_token"),
    "tools": ("lora", "generation_prompt"),
    "full": ("none", "last_token"),
    "aligned": ("none", "block_aligned:4"),
    "half": ("lora", "ratio:0.5"),
}
HEADER = 3


def save_served(folder: Path, names: Sequence[str] = tuple(DECODERS)) -> Path:
    """A base and decoders whose weights all differ enough that every answer differs."""
    tokenizer = tiny_tokenizer()
    settings = tiny.config()
    settings.vocab_size = len(tokenizer)
    settings.eos_token_id = tokenizer.eos_token_id
    # Wide weights: logits lie far enough apart that rounding never decides a token.
    settings.initializer_range = 0.3
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings.to_dict()), dtype=torch.float32)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    renderer = make_renderer(tokenizer)
    fingerprint = weights_fingerprint(load_causal_lm(str(folder / "base")))
    for seed, name in enumerate(names, start=1):
        adapter, rule = DECODERS[name]
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(seed)
        if adapter == "lora":
            config = LoraConfig(
                r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )
            decoder: Any = get_peft_model(model, config)
        else:
            decoder = families.perturbed(model, scale=0.1, seed=seed)
        decoder.save_pretrained(folder / name)
        renderer.saved_tokenizer().save_pretrained(folder / name)
        Contract(
            base_id=str(folder / "base"),
            base_revision=None,
            base_fingerprint=fingerprint,
            cache_config=cache_config(base.config),
            prompt=renderer.prompt_contract(),
            boundary=rule,
            kv_dtype="float32",
            adapter=adapter,
        ).save(folder / name)
    return folder


def load_served(folder: Path, names: Sequence[str] = tuple(DECODERS)) -> ServedModels:
    """The saved base with some of its decoders, and the base itself."""
    return ServedModels.load(
        str(folder / "base"), {name: folder / name for name in names}, serve_base=True
    )


class Oracle:
    """What `core.generate` answers, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded = {name: load_decoder(folder / name) for name in DECODERS}
        self._stop = make_renderer(tiny_tokenizer()).end_token_ids

    def forget(self) -> None:
        """Drop remembered answers, so that they do not count as memory in use."""
        self.answer.cache_clear()

    @functools.lru_cache(maxsize=2000)  # noqa: B019 (one oracle lives as long as its test module)
    def answer(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        """Greedy response of a decoder, or of the base as its own decoder."""
        return self._generate(name, prompt, max_tokens)

    def _generate(
        self, name: str, prompt: tuple[int, ...], max_tokens: int, **options: Any
    ) -> list[int]:
        loaded = self._loaded["math" if name == "base" else name]
        held = len(prompt) - 1
        if name != "base":
            held = loaded.contract.rule.base_length(len(prompt), HEADER)
        cache = loaded.prefill.prefill([prompt[:held]])
        options |= {"max_new_tokens": max_tokens, "stop_ids": self._stop}
        alone = loaded.prefill.base_weights() if name == "base" else contextlib.nullcontext()
        with alone:
            return generate(loaded.decoder, cache, [prompt], **options)[0]

    def is_tie(self, name: str, prompt: tuple[int, ...], found: Sequence[int]) -> bool:
        """Whether an answer leaves the expected one where two tokens are equally likely.

        Float32 sums in another order differ in their last digits, and so may choose the other of
        two tokens whose logits are equal but for those.
        """
        expected = self.answer(name, prompt, len(found))
        at = next(
            i for i, pair in enumerate(zip(found, expected, strict=False)) if len({*pair}) > 1
        )
        seen: list[Tensor] = []

        def keep(_: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores[0])
            return scores

        self._generate(name, prompt, at + 1, processors=LogitsProcessorList([keep]))
        scores = seen[at]
        return bool(scores.max() - scores[found[at]] < 1e-4 * scores.abs().max())


def request(decoder: str, prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> Any:
    """A greedy request; `sampling` fields and request fields may both be given."""
    fields = GenerationRequest.__dataclass_fields__
    mine = {key: options.pop(key) for key in list(options) if key in fields}
    return GenerationRequest(
        decoder,
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, **options),
        header_length=HEADER,
        **mine,
    )


def engine_of(models: ServedModels, blocks: int = 64, **options: Any) -> Engine:
    """An engine that is stepped by hand, with a pool of so many blocks of four tokens."""
    settings = {"block_tokens": 4, "max_decode_rows": 4, "chunk_tokens": 16, **options}
    geometry_bytes = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, head_dim, float32
    kv_bytes = blocks * settings["block_tokens"] * geometry_bytes
    return Engine(models, EngineConfig(kv_bytes=kv_bytes, **settings))


class Collector:
    """Gathers the events of many requests."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}

    def __call__(self, event: Event) -> None:
        self.events.setdefault(event.request_id, []).append(event)

    def done(self, request_id: str) -> bool:
        """Whether a request has ended."""
        events = self.events.get(request_id)
        return bool(events) and events[-1].finish_reason is not None

    def generation(self, request_id: str) -> Generation:
        """A request's whole response."""
        return Generation.of(self.events[request_id])


def run(engine: Engine, requests: Sequence[GenerationRequest], limit: int = 5000) -> Collector:
    """Submit all and step until every one has ended."""
    collector = Collector()
    for one in requests:
        engine.submit(one, collector)
    for _ in range(limit):
        if all(collector.done(one.request_id) for one in requests):
            return collector
        engine.step()
    raise AssertionError(f"not done after {limit} steps: {engine.stats()}")


def assert_nothing_leaks(engine: Engine) -> None:
    """Every block is free or kept without a holder once nothing runs and no session is left."""
    stats = engine.stats()
    assert stats.waiting == stats.prefilling == stats.decoding == 0
    assert stats.blocks_used == 0
