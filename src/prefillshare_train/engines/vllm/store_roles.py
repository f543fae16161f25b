"""Whose weights run a request: the base's, or a decoder's with a boundary rule of its own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from prefillshare_train.core.boundary import Kind
from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.prefill_id import (
    STORE_RULES,
    Boundary,
    PrefillId,
    check_consumer,
    check_decoder,
    is_decoder,
    serving_fingerprint,
)
from prefillshare_train.engines.vllm.store_options import StoreOptions


class Roles:
    """What an instance's model is, and which decoders it may serve.

    Args:
        vllm_config: vLLM's configuration of the instance.
        options: the connector's.

    Attributes:
        prefill_id: of the blocks that this instance writes and reads.

    Raises:
        ContractError: a decoder that is known now does not fit; it is named.
        VllmError: the base cannot be read, an instance with a decoder's full weights is to produce,
            or one without any decoder to consume.
    """

    _rules: Collection[Kind] = STORE_RULES

    def __init__(self, vllm_config: Any, options: StoreOptions) -> None:
        model: str = vllm_config.model_config.model
        fingerprint = serving_fingerprint(options.base, options.base_fingerprint, model)
        self.prefill_id = PrefillId.of(vllm_config, fingerprint)
        self._config = vllm_config.model_config.hf_text_config
        if vllm_config.kv_transfer_config.kv_role == "kv_consumer":
            check_consumer(vllm_config)
        self._instance = self._check(Path(model)) if is_decoder(model) else None
        if self._instance is not None and vllm_config.kv_transfer_config.is_kv_producer:
            role = vllm_config.kv_transfer_config.kv_role
            raise VllmError(
                f"kv_role is {role!r}, but {model} is a decoder: only the base may write K/V that "
                "others read. Use kv_consumer"
            )
        self._adapters: dict[str, Boundary | ContractError] = {}
        for name, folder in options.decoders.items():
            try:
                self._adapters[str(folder)] = self._check(folder)
            except ContractError as error:
                raise ContractError(f"decoder {name}: {error}") from None

    def boundary(self, lora_path: str | None) -> Boundary | None:
        """Where the base's part of a request's prompt ends; None for a request to the base.

        Args:
            lora_path: folder of the request's adapter, None without one.

        Raises:
            ContractError: the adapter was not trained over this base, or the instance's model is
                not a base.
        """
        if lora_path is None:
            return self._instance
        if self._instance is not None:
            raise ContractError(f"the adapter {lora_path} runs over a decoder, not over its base")
        if lora_path not in self._adapters:
            try:
                self._adapters[lora_path] = self._check(Path(lora_path))
            except ContractError as error:
                self._adapters[lora_path] = error
        found = self._adapters[lora_path]
        if isinstance(found, ContractError):
            raise found
        return found

    def _check(self, folder: Path) -> Boundary:
        return check_decoder(
            folder,
            base_fingerprint=self.prefill_id.base_fingerprint,
            kv_dtype=self.prefill_id.cache_dtype,
            config=self._config,
            rules=self._rules,
        )
