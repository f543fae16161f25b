"""A decoder over its base, used like a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from prefillshare_train.core.boundary import header_length
from prefillshare_train.core.contract import Contract
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import LoadedDecoder, load_decoder
from prefillshare_train.core.modules import causal_lm_of
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.data import Message, Renderer, Tool, saved_renderer
from prefillshare_train.data.generation_header import generation_header
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.generation import GenerationSettings, generation_settings
from prefillshare_train.hub.source import decoder_folder


class PrefillShareModel:
    """A decoder and the frozen base whose prompt cache it reads.

    Make it with `from_pretrained`. It is no `nn.Module`: it is for answering, not for training.

    Attributes:
        loaded: decode module, prefill module and contract.
        folder: where the decoder lies on disk.
    """

    def __init__(self, loaded: LoadedDecoder, folder: Path) -> None:
        self.loaded = loaded
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls,
        decoder: Path | str,
        *,
        revision: str | None = None,
        base: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PrefillShareModel:
        """Load a decoder and its base, and check that they belong together.

        Args:
            decoder: folder or hub id.
            revision: commit, tag or branch of a decoder on the hub.
            base: folder or hub id of the base, where it is not what the contract names.
            dtype: of both; the contract's K/V dtype, and a full decoder's own, where None.
            device: of both; the first GPU, or the CPU where there is none, where None.

        Raises:
            ContractError: the base is not the one that the decoder was trained over (its weights
                moved, or it is another): both fingerprints are in the message.
            HubError: there is no such decoder, or the hub cannot be reached.
        """
        folder = decoder_folder(decoder, revision)
        return cls(load_decoder(folder, base=base, dtype=dtype, device=device), folder)

    @property
    def contract(self) -> Contract:
        """What the decoder was trained against."""
        return self.loaded.contract

    @property
    def config(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        return causal_lm_of(self.loaded.decoder).config

    @property
    def device(self) -> torch.device:
        """Device of the decoder's weights."""
        return causal_lm_of(self.loaded.decoder).device

    @property
    def generation_config(self) -> GenerationConfig:
        """What `generate` does unless told otherwise."""
        found = causal_lm_of(self.loaded.decoder).generation_config
        return found if found is not None else GenerationConfig()

    @cached_property
    def renderer(self) -> Renderer:
        """Makes the prompts that the decoder was trained on; checked against the contract."""
        return saved_renderer(self.folder, self.contract.prompt)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer, which carries its chat template."""
        return self.renderer.tokenizer

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Answer prompts: the base prefills, the decoder generates.

        As `transformers`' own `generate`, for greedy decoding and sampling.

        Args:
            input_ids: (B, L) int64 prompts, padded on the left.
            attention_mask: (B, L), 0 at padding; no padding where None.
            generation_config: in place of the model's own.
            streamer: is given the prompt and every token; for one prompt at a time.
            generator: of the draws; torch's own for the device where None.
            **options: `max_new_tokens` (20 where nothing says), `do_sample`, `temperature`,
                `top_k`, `top_p`, `min_p`, `repetition_penalty`, `no_repeat_ngram_size`,
                `min_new_tokens`, `num_return_sequences`, `eos_token_id`, `pad_token_id`. EOS is
                what ended responses in training unless given.

        Returns:
            (B * num_return_sequences, L + longest response) int64 on the device of `input_ids`:
            each prompt as it was given, its response, and padding.

        Raises:
            HubError: an option is not offered, or shapes do not fit.
            ValueError: the boundary rule needs an assistant header and a prompt has none.
        """
        settings = generation_settings(
            self.generation_config,
            generation_config,
            options,
            trained_ends=self.contract.prompt.get("end_token_ids", ()),
            logits_processor=logits_processor,
        )
        prompts = _rows(input_ids, attention_mask, settings.pad_id)
        if streamer is not None:
            if len(prompts) * settings.returns != 1:
                raise HubError(
                    f"a streamer takes one response; {len(prompts) * settings.returns} asked for"
                )
            streamer.put(input_ids.cpu())
        cache = self._prefill(prompts)
        order = [row for row in range(len(prompts)) for _ in range(settings.returns)]
        answers: list[list[int]] = [[] for _ in order]
        for group in _groups([len(prompts[row]) for row in order], settings.reads_history):
            rows = [order[place] for place in group]
            found = self._answer(
                prompts, rows, cache, settings, input_ids.shape[1], streamer, generator
            )
            for place, answer in zip(group, found, strict=True):
                answers[place] = answer
        if streamer is not None:
            streamer.end()
        longest = max(map(len, answers))
        padded = [answer + [settings.pad_id] * (longest - len(answer)) for answer in answers]
        responses = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids.repeat_interleave(settings.returns, 0), responses], dim=1)

    def chat(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        **options: Any,
    ) -> str:
        """The answer to a conversation, rendered as in training.

        Args:
            messages: one user's message, or a list of messages.
            tools: functions that may be called, as JSON schemas.
            **options: those of `generate`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = self.renderer.prompt_ids(messages, tools)
        answer = self.generate(torch.tensor([ids]), **options)[0, len(ids) :]
        return self.renderer.decode(answer.tolist(), skip_special_tokens=True)

    @cached_property
    def _header(self) -> tuple[int, ...]:
        return generation_header(self.renderer)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> PromptCache:
        """The base's part of each prompt; none of it for a decoder that reads its own prompts."""
        if self.contract.method == "full_prompt":
            return self.loaded.prefill.prefill([[] for _ in prompts])
        rule = self.contract.rule
        header = self._header if rule.kind == "generation_prompt" else ()
        cuts = [
            rule.base_length(len(ids), header_length(ids, header) if header else 0)
            for ids in prompts
        ]
        return self.loaded.prefill.prefill(
            [ids[:cut] for ids, cut in zip(prompts, cuts, strict=True)]
        )

    def _answer(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        cache: PromptCache,
        settings: GenerationSettings,
        width: int,
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
    ) -> list[list[int]]:
        asked = [prompts[row] for row in rows]

        def stream(_: int, token: int) -> None:
            if streamer is not None:
                streamer.put(torch.tensor([token]))

        return generate(
            self.loaded.decoder,
            cache if rows == list(range(len(prompts))) else cache.select(rows),
            asked,
            max_new_tokens=settings.new_tokens(width),
            stop_ids=settings.stop_ids,
            processors=settings.processors(max(map(len, asked)), self.device) or None,
            sampler=(generator or _default_generator(self.device)) if settings.sampling else None,
            on_token=stream,
        )


def _rows(input_ids: Tensor, mask: Tensor | None, pad_id: int) -> list[list[int]]:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise HubError(
            f"input_ids must be of shape (batch, length), found {tuple(input_ids.shape)}"
        )
    if mask is None:
        rows: list[list[int]] = input_ids.tolist()
        padded = [row for row, ids in enumerate(rows) if ids[:2] == [pad_id, pad_id]]
        if len(rows) > 1 and padded:
            raise HubError(
                f"row {padded[0]} begins with the pad token {pad_id}: pass attention_mask"
            )
        return rows
    if mask.shape != input_ids.shape:
        raise HubError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    kept = mask.bool()
    if (kept[:, :-1] & ~kept[:, 1:]).any():
        raise HubError("prompts must be padded on the left: set tokenizer.padding_side = 'left'")
    if not kept[:, -1].all():
        raise HubError("a prompt has no token: its row of attention_mask is 0 throughout")
    return [ids[on].tolist() for ids, on in zip(input_ids, kept, strict=True)]


def _groups(lengths: Sequence[int], by_length: bool) -> list[list[int]]:
    """Places that are answered together: all, or those of one prompt length.

    Processors that read earlier tokens would take the padding of shorter rows for tokens.
    """
    if not by_length:
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(length, []).append(place)
    return list(groups.values())


def _default_generator(device: torch.device) -> torch.Generator:
    """The one that `torch.manual_seed` seeds, so that seeding works as with transformers."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
