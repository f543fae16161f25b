"""The keys of the store connector's `kv_connector_extra_config`, and what it refuses to run on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefillshare_train.engines.vllm.errors import VllmError

DEFAULT_PATH = "/dev/shm/prefillshare"


class StoreOptions(BaseModel):
    """Keys of `kv_connector_extra_config`.

    Attributes:
        path: folder of the store; all instances that share K/V must see the same.
        budget_gib: GiB that its blocks may take together; the same for all.
        wait_s: how long a decoder's request waits for a prefill that is under way.
        on_miss: what a decoder's request does whose K/V are missing: fail, or prefill with its own
            weights (recompute).
        checksums: compare each block's bytes with what was written.
        base: folder or hub id of the base, for instances that load a decoder's full weights.
        base_fingerprint: its fingerprint; spares reading the base's weights.
        decoders: folders of LoRA decoders by name, checked before the instance starts. Adapters
            that are loaded later are checked when they are first asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Path(DEFAULT_PATH)
    budget_gib: float = Field(default=4.0, gt=0)
    wait_s: float = Field(default=30.0, ge=0)
    on_miss: Literal["fail", "recompute"] = "fail"
    checksums: bool = True
    base: str | None = None
    base_fingerprint: str | None = None
    decoders: dict[str, Path] = {}

    @property
    def budget_bytes(self) -> int:
        """`budget_gib` in bytes."""
        return round(self.budget_gib * (1 << 30))

    @classmethod
    def read(cls, given: dict[str, Any]) -> StoreOptions:
        """Check the options.

        Raises:
            VllmError: a key is unknown or a value is not what it must be, or the budget is more
                than the file system holds.
        """
        try:
            options = cls.model_validate(given)
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise VllmError(
                f"kv_connector_extra_config: {found}. Its keys are {', '.join(cls.model_fields)}"
            ) from None
        place = options.path
        while not place.exists():
            place = place.parent
        held = os.statvfs(place)
        total = held.f_blocks * held.f_frsize
        if options.budget_bytes > total:
            raise VllmError(
                f"budget_gib is {options.budget_gib:g}, and the file system of {options.path} "
                f"holds {total / (1 << 30):.3g} GiB. Lower it, choose another path, or give a "
                "container more shared memory (--shm-size)"
            )
        return options


@dataclass(frozen=True)
class Unsupported:
    """One setting of an instance under which K/V could not be shared exactly."""

    option: str
    found: Any
    why: str


@dataclass
class _Findings:
    items: list[Unsupported] = field(default_factory=list)

    def refuse(self, wrong: bool, option: str, found: Any, why: str) -> None:
        if wrong:
            self.items.append(Unsupported(option, found, why))


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse settings that the store has not been shown to be exact under.

    Raises:
        VllmError: names each option with its value and why it stands in the way.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = _Findings()
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    found.refuse(
        policy != "fail",
        "kv_load_failure_policy",
        policy,
        "it would also answer requests that must be refused; leave it out, and see on_miss of "
        "kv_connector_extra_config",
    )
    for option in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        ranks = getattr(parallel, option, 1)
        found.refuse(ranks > 1, option, ranks, "a block is stored whole, by one worker")
    speculative = getattr(vllm_config, "speculative_config", None)
    found.refuse(
        speculative is not None,
        "speculative_config",
        getattr(speculative, "method", None),
        "a draft model's K/V are not in the store",
    )
    found.refuse(
        model.quantization is not None,
        "quantization",
        model.quantization,
        "a decoder was trained on the K/V of the base as its contract names it",
    )
    overrides = getattr(model, "hf_overrides", None)
    found.refuse(
        bool(overrides),
        "hf_overrides",
        overrides,
        "they may change the K/V, and a contract does not know of them",
    )
    revision = getattr(model, "revision", None)
    found.refuse(
        revision is not None,
        "revision",
        revision,
        "the base's fingerprint is of the default one; download it and name its folder",
    )
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    found.refuse(
        kinds != ["FullAttentionSpec"],
        "KV cache groups",
        kinds,
        "layers with sliding windows, latent attention or states are not stored",
    )
    if kinds == ["FullAttentionSpec"]:
        spec = groups[0].kv_cache_spec
        for option in ("sliding_window", "attention_chunk_size"):
            value = getattr(spec, option, None)
            found.refuse(value is not None, option, value, "only full attention is stored")
    block_size = vllm_config.cache_config.block_size
    hashed = getattr(kv_cache_config, "hash_block_size", None)
    found.refuse(
        hashed not in (None, block_size),
        "hash_block_size",
        hashed,
        f"it must be the block size, {block_size}",
    )
    if found.items:
        lines = [f"  {item.option} is {item.found!r}: {item.why}" for item in found.items]
        raise VllmError("the store connector cannot run on this instance:\n" + "\n".join(lines))
