"""The keys of the NIXL connector's `kv_connector_extra_config`, and what it refuses to run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefillshare_train.core.contract import CONTRACT_NAME
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.prefill_id import check_consumer, is_decoder

GUARD = "prefillshare_train.engines.vllm.guard.DecoderGuard"
"""What a decoder's `--middleware` should be."""


class NixlOptions(BaseModel):
    """Keys of `kv_connector_extra_config`; vLLM's own for NIXL beside ours.

    Attributes:
        base: folder or hub id of the base, for instances that load a decoder's full weights.
        base_fingerprint: its fingerprint; spares reading the base's weights.
        decoders: folders of LoRA decoders by name, checked before the instance starts. Adapters
            that are loaded later are checked when they are first asked.
        kv_lease_duration: seconds for which a base holds K/V that nobody has read yet.
        claim_timeout_s: how long a decoder waits for the base's answer to a claim.
        backends: NIXL's transports, such as UCX.
        backend_params, num_threads, engine_ttl: as vLLM has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    base_fingerprint: str | None = None
    decoders: dict[str, Path] = {}
    kv_lease_duration: int = Field(default=30, ge=6)
    claim_timeout_s: float = Field(default=10.0, gt=0)
    backends: list[str] = ["UCX"]
    backend_params: dict[str, Any] = {}
    num_threads: int = Field(default=4, ge=1)
    engine_ttl: float = 3600.0

    @classmethod
    def read(cls, given: dict[str, Any]) -> NixlOptions:
        """Check the options.

        Raises:
            VllmError: a key is unknown or a value is not what it must be.
        """
        if given.get("enforce_handshake_compat") is False:
            raise VllmError(
                "enforce_handshake_compat is false: with it any instance may read any other's K/V. "
                "Leave it out; base and decoders agree here by the base's fingerprint"
            )
        known = {k: v for k, v in given.items() if k != "enforce_handshake_compat"}
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise VllmError(
                f"kv_connector_extra_config: {found}. Its keys are {', '.join(cls.model_fields)}"
            ) from None


def check_role(vllm_config: Any) -> None:
    """Refuse an instance that would hand over a decoder's K/V, or mix them with the base's.

    Raises:
        VllmError: names the option, what it is, and what it should be.
    """
    transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config.model
    role = transfer.kv_role
    adapters = vllm_config.lora_config is not None
    if transfer.kv_load_failure_policy != "fail":
        raise VllmError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a decoder whose K/V "
            "do not arrive would prefill with its own weights. Use fail"
        )
    if role == "kv_producer":
        if is_decoder(model):
            raise VllmError(
                f"kv_role is kv_producer, but {model} has a {CONTRACT_NAME}: it is a decoder, and "
                "only the base may prefill for others. Use kv_consumer, or the base's folder"
            )
        if adapters:
            raise VllmError("--enable-lora with kv_role kv_producer: the base prefills alone")
    elif role == "kv_consumer":
        check_consumer(vllm_config)
        if vllm_config.cache_config.enable_prefix_caching:
            raise VllmError(
                "prefix caching is on: a later turn would reuse the decoder's own K/V of earlier "
                "ones. Start decoders with --no-enable-prefix-caching"
            )
    else:
        raise VllmError(
            f"kv_role is {role!r}: NIXL needs kv_producer for the base and kv_consumer for "
            "decoders. One process for both is the store connector's"
        )
