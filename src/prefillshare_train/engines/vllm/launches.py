"""How each instance of a deployment is started, and what the router is told about them.

`up` on one machine and `plan` for a cluster differ in places and addresses only; both come here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.instance import InstanceOptions
from prefillshare_train.engines.vllm.nixl_options import GUARD
from prefillshare_train.engines.vllm.prefill_id import NIXL_RULES, STORE_RULES, check_decoder
from prefillshare_train.engines.vllm.topology import BASE_NAME, Pool, Topology

CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16
"""vLLM's own block sizes, where none is given."""
NIXL_PORTS_ABOVE = 500
"""How far above its instance's port NIXL's handshake listens, where several share a machine."""
_STORE, _NIXL = "PrefillShareStoreConnector", "PrefillShareNixlConnector"


@dataclass(frozen=True, kw_only=True)
class InstanceSettings:
    """What all instances of a deployment have in common.

    Attributes:
        cpu: whether vLLM is a build for CPUs.
        dtype: of weights, activations and K/V; what the decoders were trained with where None.
        block_size: tokens of a block; vLLM's own where None.
        max_model_len: tokens of prompt and response; the model's own where None.
        kv_gib: GiB of K/V of an instance on CPU.
        store: folder of the block store.
        store_gib: its budget.
        store_wait_s: how long a decoder waits there for a prefill under way.
        on_miss: what a decoder does without the base's K/V: `fail`, or `recompute` them by itself.
        extra: further arguments of vLLM.
    """

    cpu: bool
    dtype: str | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    kv_gib: int = 4
    store: str = "/dev/shm/prefillshare"
    store_gib: float = 4.0
    store_wait_s: float = 30.0
    on_miss: Literal["fail", "recompute"] = "fail"
    extra: tuple[str, ...] = ()

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, as the instances will have it."""
        return self.block_size or (CPU_BLOCK_TOKENS if self.cpu else GPU_BLOCK_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an instance runs.

    Attributes:
        host, port: where it listens.
        nixl_host, nixl_port: where its handshake listens, on the route `nixl`.
        cores: CPU cores, as vLLM reads them.
        environment: further variables.
    """

    host: str = "127.0.0.1"
    port: int
    nixl_host: str = "127.0.0.1"
    nixl_port: int | None = None
    cores: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def common_contract(topology: Topology, dtype: str | None) -> tuple[str, str]:
    """The base's fingerprint and the K/V dtype on which all decoders agree.

    Args:
        dtype: what the instances are asked to run in, which must then be the decoders' own.

    Raises:
        VllmError: decoders were trained over different bases, prompts or dtypes.
    """
    first = topology.decoders[0]
    for decoder in topology.decoders[1:]:
        for what, mine, other in (
            ("base", decoder.contract.base_fingerprint, first.contract.base_fingerprint),
            ("tokenizer or template", decoder.contract.prompt, first.contract.prompt),
            ("K/V dtype", decoder.contract.kv_dtype, first.contract.kv_dtype),
            ("base config", decoder.contract.cache_config, first.contract.cache_config),
        ):
            if mine != other:
                raise VllmError(
                    f"decoders {first.name} and {decoder.name} cannot share a prefill: {what} of "
                    f"{first.name} is {other}, of {decoder.name} {mine}. Serve them apart"
                )
    return first.contract.base_fingerprint, dtype or first.contract.kv_dtype


def check_contracts(
    topology: Topology, *, base_fingerprint: str, kv_dtype: str, config: PreTrainedConfig | None
) -> None:
    """Check every decoder against the base and the route.

    Args:
        config: of the base's text part; None where the base is not on this machine.

    Raises:
        ContractError: one does not fit; it is named, and each difference listed.
    """
    rules = NIXL_RULES if topology.route == "nixl" else STORE_RULES
    for decoder in topology.decoders:
        try:
            check_decoder(
                decoder.folder,
                base_fingerprint=base_fingerprint,
                kv_dtype=kv_dtype,
                config=config,
                rules=rules,
            )
        except ContractError as error:
            raise ContractError(f"decoder {decoder.name}: {error}") from None


def instance_options(
    topology: Topology,
    pool: Pool,
    settings: InstanceSettings,
    place: Place,
    *,
    base_fingerprint: str,
    dtype: str,
    folders: Mapping[str, str],
) -> InstanceOptions:
    """How one instance of a pool is started.

    Args:
        folders: where the instance finds the base (`base`) and each decoder, by name.
    """
    full = next((name for name in pool.serves if pool.model != topology.base), None)
    adapters = {decoder.name: folders[decoder.name] for decoder in pool.adapters}
    decodes = pool.role == "decode"
    return InstanceOptions(
        model=folders[full or BASE_NAME],
        served_name=full or BASE_NAME,
        port=place.port,
        host=place.host,
        dtype=dtype,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len,
        # A decoder's own K/V of earlier turns would be taken for the base's.
        prefix_caching=not decodes,
        kv_transfer=_kv_transfer(topology, pool, settings, base_fingerprint, adapters),
        lora=adapters,
        max_lora_rank=pool.max_lora_rank if adapters else None,
        middleware=(GUARD,) if decodes and topology.route == "nixl" else (),
        enforce_eager=settings.cpu,
        cores=place.cores,
        cpu_kv_gib=settings.kv_gib if settings.cpu else None,
        nixl_port=place.nixl_port,
        nixl_host=place.nixl_host,
        environment=place.environment,
        extra=settings.extra,
    )


def _kv_transfer(
    topology: Topology,
    pool: Pool,
    settings: InstanceSettings,
    base_fingerprint: str,
    adapters: Mapping[str, str],
) -> dict[str, Any]:
    if topology.route == "nixl":
        if settings.on_miss != "fail":
            raise VllmError(
                f"--on-miss {settings.on_miss} does not go with --route nixl: its decoders refuse "
                "what they would have to prefill. Leave it out, or use --route store"
            )
        config: dict[str, Any] = {
            "kv_connector": _NIXL,
            "kv_role": "kv_consumer" if pool.role == "decode" else "kv_producer",
            "kv_connector_extra_config": {"base_fingerprint": base_fingerprint},
        }
        if settings.cpu:
            config["kv_buffer_device"] = "cpu"
    else:
        config = {
            "kv_connector": _STORE,
            # The base reads too: what it wrote before it was started again.
            "kv_role": "kv_consumer" if pool.role == "decode" else "kv_both",
            "kv_connector_extra_config": {
                "path": settings.store,
                "budget_gib": settings.store_gib,
                "wait_s": settings.store_wait_s,
                "on_miss": settings.on_miss,
                "base_fingerprint": base_fingerprint,
            },
        }
    if adapters:
        config["kv_connector_extra_config"]["decoders"] = dict(adapters)
    return config


def router_options(
    topology: Topology,
    settings: InstanceSettings,
    addresses: Mapping[str, Sequence[str]],
    folders: Mapping[str, str],
    server: Mapping[str, Any],
) -> dict[str, Any]:
    """The router's configuration, as plain values for its file.

    Args:
        addresses: of each pool's instances, by the pool's name.
        folders: where the router finds each decoder, by name.
        server: options of the server that clients meet.
    """
    first = topology.pools[0]
    decoders: dict[str, Any] = {}
    for pool in topology.pools:
        for name in pool.serves:
            decoders[name] = {"folder": folders[name]}
            if pool.role == "decode":
                decoders[name]["replicas"] = list(addresses[pool.name])
    options: dict[str, Any] = {
        "handover": "nixl" if topology.route == "nixl" else "store",
        "prefill": list(addresses[first.name]),
        "base_model": BASE_NAME,
        "decoders": {d.name: decoders[d.name] for d in topology.decoders},
        "block_tokens": settings.block_tokens,
        "server": dict(server),
    }
    if settings.max_model_len is not None:
        options["max_model_len"] = settings.max_model_len
    return options
