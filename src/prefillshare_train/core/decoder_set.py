"""One base and several decoders over it, in one process; LoRA decoders share the base's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from prefillshare_train.core.alora import run_as_lora
from prefillshare_train.core.contract import Contract, ContractError, weights_fingerprint
from prefillshare_train.core.devices import default_device, default_dtype
from prefillshare_train.core.modules import load_causal_lm


class DecoderSet:
    """A base with its decoders, by name.

    The base stays an ordinary model beside the adapters' one: both read the same weights, so
    nothing has to switch adapters off for a prefill, and the two may run in different threads.

    Args:
        base: hub id or folder of the base.
        folders: the decoders' folders by name.
        dtype: of base and decoders; where None the decoders' K/V dtype, and without any
            `default_dtype()`.
        device: of base and decoders; `default_device()` where None.

    Attributes:
        base: the plain base, frozen.
        base_fingerprint: `weights_fingerprint` of it.
        contracts: what each decoder was trained against. Not verified here: callers know which
            mismatches they take.
        full: fully trained decoders.
        lora: the model that holds all adapters, or None.
        adapters: each LoRA decoder's adapter name in `lora`.
        dtype: of the K/V.
        dtype_differences: by name, of each decoder trained on K/V of another dtype than the one
            asked for, what to say of it; for callers to tell.

    Raises:
        ContractError: a folder has no contract, or no dtype is given and the decoders were trained
            on K/V of several.
        UnsupportedModelError: the base's architecture is refused.
    """

    def __init__(
        self,
        base: str,
        folders: Mapping[str, Path],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        device = device or default_device()
        self.contracts = {name: Contract.load(folder) for name, folder in folders.items()}
        first = next(iter(self.contracts.values()), None)
        trained = getattr(torch, first.kv_dtype) if first else default_dtype(device)
        self.dtype = dtype or trained
        self.dtype_differences = {
            name: difference
            for name, contract in self.contracts.items()
            if (difference := contract.kv_dtype_difference(self.dtype))
        }
        if dtype is None:
            for name, difference in self.dtype_differences.items():
                raise ContractError(
                    f"decoder {name} ({folders[name]}) was {difference}, as for the first decoder. "
                    "Run them apart, or name one dtype for all (--dtype)"
                )
        model = load_causal_lm(base, dtype=self.dtype, revision=revision, device=device)
        model.requires_grad_(False).eval()
        self.base = model
        self.base_fingerprint = weights_fingerprint(model)
        self.full: dict[str, PreTrainedModel] = {}
        self.lora: PeftModel | None = None
        self.adapters: dict[str, str] = {}
        for name, folder in folders.items():
            if self.contracts[name].adapter == "none":
                decoder = load_causal_lm(str(folder), dtype=self.dtype, device=device)
                self.full[name] = decoder.requires_grad_(False).eval()
            else:
                self._add_adapter(name, str(folder))

    def _add_adapter(self, name: str, folder: str) -> None:
        # PEFT keeps adapters as submodules, whose names may not hold a dot; a decoder's may.
        adapter = self.adapters[name] = f"decoder_{len(self.adapters)}"
        if self.lora is None:
            twin = twin_of(self.base)
            self.lora = PeftModel.from_pretrained(twin, folder, adapter_name=adapter).eval()
        else:
            self.lora.load_adapter(folder, adapter_name=adapter)
        run_as_lora(self.lora)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second model object that reads the very same parameter tensors."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=dict(shared))
