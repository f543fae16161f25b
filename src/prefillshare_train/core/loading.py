"""Loading a trained decoder over its base, with the contract checked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from prefillshare_train.core.alora import run_as_lora
from prefillshare_train.core.contract import Contract, weights_fingerprint
from prefillshare_train.core.devices import default_device
from prefillshare_train.core.modules import PrefillModule, load_causal_lm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedDecoder:
    """A decoder ready to answer.

    Attributes:
        decoder: the decode module.
        prefill: the frozen base that fills its prompt cache.
        contract: what it was trained against.
    """

    decoder: nn.Module
    prefill: PrefillModule
    contract: Contract


def load_decoder(
    folder: Path | str,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadedDecoder:
    """Load a decoder's folder and the base it was trained over.

    Args:
        base: hub id or path of the base, where it is not what the contract names.
        dtype: dtype of base and decoder; another than the contract's K/V dtype is warned of. Where
            None, the base has the contract's K/V dtype, and a fully trained decoder the one that it
            was saved in.
        device: of both; `default_device()` where None.

    Raises:
        ContractError: the folder has no contract, or the base is not the one that it names. Both
            fingerprints are in the message.
    """
    folder = Path(folder)
    device = device or default_device()
    contract = Contract.load(folder)
    model = load_causal_lm(
        base or contract.base_id,
        dtype=dtype or getattr(torch, contract.kv_dtype),
        revision=contract.base_revision if base is None else None,
        device=device,
    )
    contract.verify(base_fingerprint=weights_fingerprint(model), config=model.config)
    if dtype is not None and (difference := contract.kv_dtype_difference(dtype)):
        logger.warning("%s was %s as asked", folder, difference)
    if contract.adapter == "none":
        decoder: nn.Module = load_causal_lm(str(folder), dtype=dtype or "auto", device=device)
        return LoadedDecoder(decoder.eval(), PrefillModule(model), contract)
    decoder = run_as_lora(PeftModel.from_pretrained(model, str(folder)))
    return LoadedDecoder(decoder.eval(), PrefillModule(decoder), contract)


def add_adapter(loaded: LoadedDecoder, folder: Path | str, name: str) -> Contract:
    """Load a second LoRA decoder beside the first, over the same base and for the same prompts.

    Choose between them with `loaded.decoder.set_adapter`; the first is called `default`.

    Returns:
        The added decoder's contract.

    Raises:
        ContractError: it was trained over another base, prompt format or boundary, so that the
            two cannot read one cache.
        ValueError: one of the two is fully trained and has no adapter.
    """
    contract = Contract.load(Path(folder))
    contract.verify(
        base_fingerprint=loaded.contract.base_fingerprint,
        prompt=loaded.contract.prompt,
        boundary=loaded.contract.rule,
    )
    if not isinstance(loaded.decoder, PeftModel) or contract.adapter == "none":
        raise ValueError(f"{folder} cannot be added: both decoders must be LoRA adapters")
    loaded.decoder.load_adapter(str(folder), adapter_name=name)
    run_as_lora(loaded.decoder)
    return contract
