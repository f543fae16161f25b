"""Who is evaluated: one base, and decoders over it that are given the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.data import Renderer, base_renderer, saved_renderer
from prefillshare_train.evaluation.task import EvaluationError

BASE = "base"


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder as the user names it: `base`, a folder, or `name=folder`."""

    name: str
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> DecoderSpec:
        """Read `base`, `folder` or `name=folder`.

        Raises:
            EvaluationError: there is no such folder.
        """
        if text == BASE:
            return cls(BASE, None)
        name, _, path = text.rpartition("=")
        folder = Path(path)
        if not folder.is_dir():
            raise EvaluationError(
                f"--decoder {text}: there is no folder {folder}. Give `base`, a decoder's folder, "
                "or name=folder"
            )
        # `runs/math/decoder` is called math: every finished run's folder ends in `decoder`.
        place = folder.resolve()
        return cls(name or (place.parent.name if place.name == "decoder" else place.name), folder)


@dataclass(frozen=True)
class Decoder:
    """A loaded decoder.

    Attributes:
        name: as in reports.
        method: `base`, or the contract's method.
        rule: who runs which prompt token.
        identity: SHA-256 of its weight files; the base's fingerprint for `base`.
        mismatch: what in its contract does not fit; empty where all does.
        contract: the contract as JSON values; empty for `base`.
    """

    name: str
    method: str
    rule: BoundaryRule
    identity: str
    adapter: str
    mismatch: str = ""
    contract: dict[str, Any] = field(default_factory=dict, compare=False)


class Contestants:
    """A base and its decoders, loaded; LoRA decoders share one copy of the weights.

    Args:
        base: hub id or folder of the base.
        specs: the decoders.
        chat_template: template file or packaged name, for evaluating the base alone.
        dtype: of base and decoders; where None the decoders' K/V dtype, bfloat16 for a base alone.
        allow_mismatch: evaluate decoders whose contract names another base or prompt form; the
            difference is kept in `Decoder.mismatch`.

    Raises:
        ContractError: a contract does not fit and `allow_mismatch` is False.
        EvaluationError: two decoders have one name.
    """

    def __init__(
        self,
        base: str,
        specs: Sequence[DecoderSpec],
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        names = [spec.name for spec in specs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise EvaluationError(
                f"two decoders are called {min(twice)}; name them: --decoder first=DIR"
            )
        folders = {spec.name: spec.folder for spec in specs if spec.folder is not None}
        self._loaded = DecoderSet(base, folders, dtype=dtype, revision=revision, device=device)
        self.dtype = self._loaded.dtype
        self.base_fingerprint = self._loaded.base_fingerprint
        self.prefill = PrefillModule(self._loaded.base)
        self.decoders: list[Decoder] = []
        contracts = self._loaded.contracts
        first = next(iter(contracts.values()), None)
        self.renderer = self._renderer(base, revision, specs, contracts, chat_template)
        prompt = self.renderer.prompt_contract()
        for spec in specs:
            if spec.folder is None:
                rule = first.rule if first else BoundaryRule("last_token")
                self.decoders.append(
                    Decoder(BASE, BASE, rule, self.base_fingerprint, adapter="none")
                )
                continue
            contract = contracts[spec.name]
            mismatch = ""
            try:
                contract.verify(
                    base_fingerprint=self.base_fingerprint,
                    config=self._loaded.base.config,
                    prompt=prompt,
                )
            except ContractError as error:
                if not allow_mismatch:
                    raise ContractError(f"{spec.folder}: {error}") from error
                mismatch = str(error)
            self.decoders.append(
                Decoder(
                    spec.name,
                    contract.method,
                    contract.rule,
                    _identity(spec.folder),
                    contract.adapter,
                    mismatch,
                    dataclasses.asdict(contract),
                )
            )

    @staticmethod
    def _renderer(
        base: str,
        revision: str | None,
        specs: Sequence[DecoderSpec],
        contracts: dict[str, Contract],
        chat_template: str | None,
    ) -> Renderer:
        """The first decoder's prompts; all others are checked against them."""
        for spec in specs:
            if spec.folder is not None:
                if chat_template is not None:
                    raise EvaluationError(
                        "a chat template is given, but decoders carry the one they were trained "
                        "with; leave it out"
                    )
                return saved_renderer(spec.folder, contracts[spec.name].prompt)
        return base_renderer(base, revision, chat_template)

    @contextlib.contextmanager
    def running(self, decoder: Decoder) -> Iterator[nn.Module]:
        """The decode module of a decoder, its adapter chosen."""
        loaded = self._loaded
        if decoder.method == BASE:
            yield loaded.base
        elif decoder.name in loaded.full:
            yield loaded.full[decoder.name]
        else:
            assert loaded.lora is not None
            loaded.lora.set_adapter(loaded.adapters[decoder.name])
            yield loaded.lora

    @property
    def position_count(self) -> int | None:
        """Positions that the model was made for (`max_position_embeddings`), None if not told."""
        limit: int | None = getattr(self._loaded.base.config, "max_position_embeddings", None)
        return limit


def _identity(folder: Path) -> str:
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"
