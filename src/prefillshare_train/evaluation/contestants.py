"""Who is evaluated: one base, and decoders over it that are given the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.core.decoder_set import DecoderSet
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.data import Renderer, base_renderer, saved_renderer
from prefillshare_train.evaluation.task import EvaluationError
from prefillshare_train.serving.adapters import BASE_ADAPTER, StackedAdapters, stack_adapters

BASE = "base"

RowSwitch = Callable[[list[list[int]]], contextlib.AbstractContextManager[None]]
"""Entered around a forward pass, with the row that each of its tokens belongs to."""


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder as the user names it: `base`, a folder, `name=base` or `name=folder`."""

    name: str
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> DecoderSpec:
        """Read `base`, `folder`, `name=base` or `name=folder`; a folder `base` is `./base`.

        Raises:
            EvaluationError: there is no such folder.
        """
        name, _, path = text.rpartition("=")
        if path == BASE:
            return cls(name or BASE, None)
        folder = Path(path)
        if not folder.is_dir():
            raise EvaluationError(
                f"--decoder {text}: there is no folder {folder}. Give `base`, a decoder's folder, "
                "name=base or name=folder"
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
        mismatch: what in its contract does not fit, the K/V dtype too; empty where all does.
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
        revision: of the base; where None, the one that the contracts name for `base`.
        chat_template: template file or packaged name, for evaluating the base alone.
        dtype: of base and decoders; a decoder trained on K/V of another has that in its `mismatch`.
            Where None, the decoders' K/V dtype, `default_dtype()` for a base alone.
        allow_mismatch: evaluate decoders whose contract names another base or prompt form; the
            difference is kept in `Decoder.mismatch`.

    Attributes:
        base: hub id or folder of the base.
        revision: as loaded.

    Raises:
        ContractError: a contract does not fit and `allow_mismatch` is False, or the decoders have
            several K/V dtypes and no `dtype` is given.
        EvaluationError: two decoders have one name, or there is no such base.
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
        self.base = base
        self.revision = revision or _common_revision(base, folders.values())
        self.renderer = renderer_of(base, specs, revision=revision, chat_template=chat_template)
        prompt = self.renderer.prompt_contract()
        self._loaded = DecoderSet(base, folders, dtype=dtype, revision=self.revision, device=device)
        self.dtype = self._loaded.dtype
        self.base_fingerprint = self._loaded.base_fingerprint
        self.prefill = PrefillModule(self._loaded.base)
        lora, adapters = self._loaded.lora, tuple(self._loaded.adapters.values())
        whole = stack_adapters(self._loaded.base, lora, adapters) if lora else None
        self._stackable = whole is not None
        self._stacks = {} if whole is None else {frozenset(adapters): whole}
        self.decoders: list[Decoder] = []
        contracts = self._loaded.contracts
        first = next(iter(contracts.values()), None)
        for spec in specs:
            if spec.folder is None:
                rule = first.rule if first else BoundaryRule("last_token")
                self.decoders.append(
                    Decoder(spec.name, BASE, rule, self.base_fingerprint, adapter="none")
                )
                continue
            contract = contracts[spec.name]
            mismatches = []
            if difference := self._loaded.dtype_differences.get(spec.name):
                mismatches.append(f"this decoder was {difference}")
            try:
                contract.verify(
                    base_fingerprint=self.base_fingerprint,
                    config=self._loaded.base.config,
                    prompt=prompt,
                )
            except ContractError as error:
                if not allow_mismatch:
                    raise ContractError(f"{spec.folder}: {error}") from error
                mismatches.append(str(error))
            self.decoders.append(
                Decoder(
                    spec.name,
                    contract.method,
                    contract.rule,
                    _identity(spec.folder),
                    contract.adapter,
                    "; ".join(mismatches),
                    dataclasses.asdict(contract),
                )
            )

    def lane_of(self, decoder: Decoder) -> str | None:
        """Decoders of one lane can answer in one batch: their own names, None for all stacked."""
        in_stack = decoder.method == BASE or decoder.name in self._loaded.adapters
        return None if self._stackable and in_stack else decoder.name

    def adapter_of(self, decoder: Decoder) -> str:
        """How its adapter is run, which bfloat16 answers depend on: `none`, `stacked` or `peft`."""
        if decoder.name not in self._loaded.adapters:
            return "none"
        return "stacked" if self._stackable else "peft"

    def model_for(self, owners: Sequence[Decoder]) -> tuple[nn.Module, RowSwitch | None]:
        """A model that runs row i as `owners[i]`, decoders of one lane.

        Returns:
            The model, and what `core.generate` takes as `running`.
        """
        loaded, first = self._loaded, owners[0]
        if all(decoder.method == BASE for decoder in owners):
            return loaded.base, None
        if first.name in loaded.full:
            return loaded.full[first.name], None
        if not self._stackable:
            assert loaded.lora is not None
            loaded.lora.set_adapter(loaded.adapters[first.name])
            return loaded.lora, None
        names = [loaded.adapters.get(decoder.name, BASE_ADAPTER) for decoder in owners]
        model, adapters = self._stack(frozenset(names) - {BASE_ADAPTER})

        def switch(rows: list[list[int]]) -> contextlib.AbstractContextManager[None]:
            return adapters.running_tokens([[names[row] for row in part] for part in rows])

        return model, switch

    def _stack(self, names: frozenset[str]) -> tuple[PreTrainedModel, StackedAdapters]:
        """Only the adapters of a batch: every other would cost all of its rows."""
        if names not in self._stacks:
            assert self._loaded.lora is not None
            stack = stack_adapters(self._loaded.base, self._loaded.lora, sorted(names))
            assert stack is not None
            self._stacks[names] = stack
        return self._stacks[names]

    @property
    def position_count(self) -> int | None:
        """Positions that the model was made for (`max_position_embeddings`), None if not told."""
        limit: int | None = getattr(self._loaded.base.config, "max_position_embeddings", None)
        return limit


def renderer_of(
    base: str,
    specs: Sequence[DecoderSpec],
    *,
    revision: str | None = None,
    chat_template: str | None = None,
) -> Renderer:
    """The prompts of an evaluation, without loading any weights.

    They are the first decoder's, and without decoders the base's own. A base that has no chat
    template completes texts: its prompts are plain (`Renderer.is_plain`).

    Args: as of `Contestants`.

    Raises:
        ContractError: the decoder's folder has no contract.
        DataError: there is no such template, or the decoder's tokenizer is not what it was.
        EvaluationError: there is no such base, or decoders are given a chat template.
    """
    folders = [spec.folder for spec in specs if spec.folder is not None]
    revision = revision or _common_revision(base, folders)
    _require_base(base, revision)
    if not folders:
        try:
            return base_renderer(base, revision, chat_template, prompt_template="plain")
        except OSError as error:
            raise EvaluationError(
                f"--base {base}: its tokenizer cannot be read ({_first_line(error)}). Restore it"
            ) from error
    if chat_template is not None:
        raise EvaluationError(
            "a chat template is given, but decoders carry the one they were trained with; leave "
            "it out"
        )
    return saved_renderer(folders[0], Contract.load(folders[0]).prompt)


def _common_revision(base: str, folders: Iterable[Path]) -> str | None:
    """The revision at which decoders were trained over this base, where they agree on it."""
    contracts = [Contract.load(folder) for folder in folders]
    found = {contract.base_revision for contract in contracts if contract.base_id == base}
    return found.pop() if len(found) == 1 else None


def _require_base(base: str, revision: str | None) -> None:
    """Tell a mistyped base before the weights of decoders are read."""
    try:
        AutoConfig.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise EvaluationError(
            f"--base {base}: there is no model{at} ({_first_line(error)}). Give a folder with a "
            "config.json, or a hub id"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _identity(folder: Path) -> str:
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"
