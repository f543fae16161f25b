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
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from prefillshare_train.core.alora import run_as_lora
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError, weights_fingerprint
from prefillshare_train.core.modules import PrefillModule, causal_lm_of, load_causal_lm
from prefillshare_train.data import Renderer, make_renderer, saved_renderer
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
        contracts = {s.name: Contract.load(s.folder) for s in specs if s.folder is not None}
        first = next(iter(contracts.values()), None)
        self.dtype = dtype or getattr(torch, first.kv_dtype if first else "bfloat16")
        plain = load_causal_lm(base, dtype=self.dtype, revision=revision, device=device)
        self.base_fingerprint = weights_fingerprint(plain)
        self._full: dict[str, nn.Module] = {}
        self._adapters: dict[str, str] = {}
        self._shared: nn.Module = plain
        self.decoders: list[Decoder] = []
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
                    base_fingerprint=self.base_fingerprint, config=plain.config, prompt=prompt
                )
            except ContractError as error:
                if not allow_mismatch:
                    raise ContractError(f"{spec.folder}: {error}") from error
                mismatch = str(error)
            self._load(spec.name, spec.folder, contract, device)
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
        self.prefill = PrefillModule(self._shared)

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
        try:
            ends = GenerationConfig.from_pretrained(base, revision=revision or "main").eos_token_id
        except OSError:
            ends = None
        return make_renderer(
            AutoTokenizer.from_pretrained(base, revision=revision),
            chat_template=chat_template,
            end_token_ids=[ends] if isinstance(ends, int) else list(ends or []),
        )

    def _load(self, name: str, folder: Path, contract: Contract, device: str | None) -> None:
        if contract.adapter == "none":
            self._full[name] = load_causal_lm(str(folder), dtype=self.dtype, device=device).eval()
            return
        # PEFT keeps adapters as submodules, whose names may not hold a dot; a decoder's may.
        adapter = self._adapters[name] = f"decoder_{len(self._adapters)}"
        if isinstance(self._shared, PeftModel):
            self._shared.load_adapter(str(folder), adapter_name=adapter)
            run_as_lora(self._shared)
        else:
            shared = PeftModel.from_pretrained(self._shared, str(folder), adapter_name=adapter)
            self._shared = run_as_lora(shared).eval()

    @contextlib.contextmanager
    def running(self, decoder: Decoder) -> Iterator[nn.Module]:
        """The decode module of a decoder, its adapter chosen."""
        if decoder.method == BASE:
            with self.prefill.base_weights():
                yield self._shared
        elif decoder.name in self._full:
            yield self._full[decoder.name]
        else:
            assert isinstance(self._shared, PeftModel)
            self._shared.set_adapter(self._adapters[decoder.name])
            yield self._shared

    @property
    def position_count(self) -> int | None:
        """Positions that the model was made for (`max_position_embeddings`), None if not told."""
        limit: int | None = getattr(
            causal_lm_of(self._shared).config, "max_position_embeddings", None
        )
        return limit


def _identity(folder: Path) -> str:
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"
