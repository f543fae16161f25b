"""What is served: a base and its decoders, loaded and checked against each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.families import position_limit
from prefillshare_train.core.few_rows import use_few_rows
from prefillshare_train.data import Renderer, base_renderer, saved_renderer
from prefillshare_train.serving.adapters import (
    BASE_ADAPTER,
    NoAdapters,
    PeftAdapters,
    stack_adapters,
)
from prefillshare_train.serving.api import ServingError
from prefillshare_train.serving.lane import Lane

logger = logging.getLogger(__name__)

BASE = "base"
"""Name under which the base itself can be served."""


@dataclass(frozen=True)
class ServedDecoder:
    """One decoder.

    Attributes:
        name: as requests call it.
        rule: who runs which prompt token.
        lane: the model that runs it, with others where they are adapters of one base.
        adapter: its name there.
        contract: what it was trained against; None for the base.
    """

    name: str
    rule: BoundaryRule
    lane: Lane
    adapter: str
    contract: Contract | None


class ServedModels:
    """A base and its decoders in memory; LoRA decoders and the prefill share one copy of weights.

    Args:
        loaded: the base and the decoders.
        renderer: makes the prompts that all of them were trained on.
        serve_base: also answer as the base itself, under the name `base`.

    Attributes:
        decoders: by name.
        base: the frozen base that prefills.
    """

    def __init__(self, loaded: DecoderSet, renderer: Renderer, *, serve_base: bool = False) -> None:
        self.base = loaded.base
        self.base_fingerprint = loaded.base_fingerprint
        self.dtype = loaded.dtype
        self.renderer = renderer
        lanes = _lora_lanes(loaded)
        for model in loaded.full.values():
            use_few_rows(model)
        self.decoders: dict[str, ServedDecoder] = {}
        for name, contract in loaded.contracts.items():
            adapter = loaded.adapters.get(name, BASE_ADAPTER)
            full = loaded.full.get(name)
            lane = lanes[adapter] if full is None else Lane(full, NoAdapters())
            self.decoders[name] = ServedDecoder(name, contract.rule, lane, adapter, contract)
        if serve_base or not self.decoders:
            rule = BoundaryRule("last_token")
            lane = lanes[BASE_ADAPTER]
            self.decoders[BASE] = ServedDecoder(BASE, rule, lane, BASE_ADAPTER, None)

    @classmethod
    def load(
        cls,
        base: str,
        decoders: Mapping[str, Path],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        device: str | None = None,
        chat_template: str | None = None,
        serve_base: bool = False,
    ) -> ServedModels:
        """Load a base and decoders, and refuse those that do not fit.

        Args:
            base: hub id or folder.
            decoders: folders by name.
            dtype: of base and decoders; a decoder trained on K/V of another is warned of. Where
                None, the decoders' K/V dtype.
            chat_template: a `.jinja` file or packaged name, for serving the base alone; decoders
                carry the template they were trained with.

        Raises:
            ContractError: a decoder was trained over another base, or on other prompts or, without
                `dtype`, K/V of another dtype than the first; its name and both values are in the
                message.
            ServingError: a decoder is called `base` beside the base, or a template is given with
                decoders.
        """
        if serve_base and BASE in decoders:
            raise ServingError(f"a decoder is called {BASE!r}, which names the base; rename it")
        if chat_template is not None and decoders:
            raise ServingError(
                "a chat template is given, but decoders carry the one they were trained with; "
                "leave it out"
            )
        loaded = DecoderSet(base, decoders, dtype=dtype, revision=revision, device=device)
        renderer = None
        for name, folder in decoders.items():
            contract = loaded.contracts[name]
            try:
                if renderer is None:
                    renderer = saved_renderer(folder, contract.prompt)
                contract.verify(
                    base_fingerprint=loaded.base_fingerprint,
                    config=loaded.base.config,
                    prompt=renderer.prompt_contract(),
                )
            except ContractError as error:
                raise ContractError(f"decoder {name} ({folder}): {error}") from error
        for name, difference in loaded.dtype_differences.items():
            logger.warning("decoder %s was %s as asked", name, difference)
        if renderer is None:
            renderer = base_renderer(base, revision, chat_template)
        return cls(loaded, renderer, serve_base=serve_base)

    @property
    def max_positions(self) -> int | None:
        """Positions that the base can run; None where its configuration does not tell."""
        config = self.base.config
        limits = [getattr(config, "max_position_embeddings", None), position_limit(config)]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None


def _lora_lanes(loaded: DecoderSet) -> dict[str, Lane]:
    """The lane of each LoRA decoder and of the base: one for all where their rows can be mixed."""
    names = loaded.adapters.values()
    if loaded.lora is None:
        return {BASE_ADAPTER: Lane(loaded.base, NoAdapters())}
    stacked = stack_adapters(loaded.base, loaded.lora, tuple(names))
    if stacked is not None:
        return dict.fromkeys([*names, BASE_ADAPTER], Lane(*stacked))
    switch = PeftAdapters(loaded.lora)
    if switch.can_mix:
        return dict.fromkeys([*names, BASE_ADAPTER], Lane(loaded.lora, switch))
    lanes = {name: Lane(loaded.lora, switch) for name in names}
    return lanes | {BASE_ADAPTER: Lane(loaded.base, NoAdapters())}
