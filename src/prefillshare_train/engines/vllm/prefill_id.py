"""What two instances must share for one to read K/V that the other wrote, checked as they start.

The id covers everything that shapes a block of K/V: the base's weights, dtypes, geometry. Whose
weights an instance runs besides is not part of it: that is the point.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedConfig

from prefillshare_train.core.boundary import BoundaryRule, Kind, header_length
from prefillshare_train.core.contract import CONTRACT_NAME, Contract, ContractError, cache_config
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.fingerprint import base_fingerprint

STORE_RULES: tuple[Kind, ...] = get_args(Kind)
"""The store serves every rule as trained: it hands over as many tokens as the rule says."""
NIXL_RULES: tuple[Kind, ...] = ("last_token",)
"""NIXL hands over the whole prompt, of which vLLM recomputes the last token."""


@dataclass(frozen=True)
class PrefillId:
    """Everything that shapes a block of K/V.

    Attributes:
        base_fingerprint: `weights_fingerprint` of the base.
        model_dtype: dtype of the weights and activations, such as `bfloat16`.
        cache_dtype: dtype of the K/V, never `auto`.
        layers, kv_heads, head_size: geometry of the whole model, all ranks together.
        block_size: tokens in a block.
        cache_config: `core.contract.cache_config`, RoPE and windows among it, as JSON: the same
            weights with another RoPE write other K/V.
    """

    base_fingerprint: str
    model_dtype: str
    cache_dtype: str
    layers: int
    kv_heads: int
    head_size: int
    block_size: int
    cache_config: str

    @classmethod
    def of(cls, vllm_config: Any, fingerprint: str) -> PrefillId:
        """The id of an instance, from vLLM's configuration of it."""
        model, cache = vllm_config.model_config, vllm_config.cache_config
        model_dtype = str(model.dtype).removeprefix("torch.")
        return cls(
            base_fingerprint=fingerprint,
            model_dtype=model_dtype,
            cache_dtype=model_dtype if cache.cache_dtype == "auto" else str(cache.cache_dtype),
            layers=model.get_total_num_hidden_layers(),
            kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            block_size=cache.block_size,
            cache_config=json.dumps(cache_config(model.hf_text_config), sort_keys=True),
        )

    @property
    def digest(self) -> str:
        """32 hexadecimal digits; equal where blocks can be shared."""
        values = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Boundary:
    """A decoder's boundary rule, with what it takes to apply it to token ids.

    Attributes:
        rule: who runs which prompt token.
        header: token ids of the assistant header, for `generation_prompt`.
    """

    rule: BoundaryRule
    header: tuple[int, ...] = ()

    def base_length(self, prompt: Sequence[int]) -> int:
        """Number of prompt tokens whose K/V come from the base, in `[0, len(prompt) - 1]`.

        Raises:
            ValueError: the prompt is empty, or has no assistant header where the rule needs one.
        """
        length = header_length(prompt, self.header) if self.header else 0
        return self.rule.base_length(len(prompt), length)


def check_decoder(
    folder: Path | str,
    *,
    base_fingerprint: str,
    kv_dtype: str,
    config: PreTrainedConfig | None,
    rules: Collection[Kind] = STORE_RULES,
) -> Boundary:
    """Check a decoder's contract against the instance that is about to serve it.

    Args:
        folder: full weights or a LoRA adapter, with its contract.
        base_fingerprint: of the base that prefills.
        kv_dtype: of the K/V that the instance reads, such as `bfloat16`.
        config: of the text part of the base, or of what the instance runs; None where neither is
            here yet, and its instances check it as they start.
        rules: boundary rules that the route serves exactly.

    Returns:
        Where the base's part of a prompt ends.

    Raises:
        ContractError: there is no contract, or it does not fit; each difference is listed with
            both values.
    """
    contract = Contract.load(Path(folder))
    compared: dict[str, tuple[Any, Any]] = {
        "method": (contract.method, "prefillshare"),
        "base fingerprint": (contract.base_fingerprint, base_fingerprint),
        "KV dtype": (contract.kv_dtype, kv_dtype),
    }
    if config is not None:
        here = cache_config(config)
        for key in sorted({*here, *contract.cache_config}):
            compared[f"config {key}"] = (contract.cache_config.get(key), here.get(key))
    different = [
        f"  {name}: the contract says {trained!r}, here it is {found!r}"
        for name, (trained, found) in compared.items()
        if trained != found
    ]
    rule = contract.rule
    if rule.kind not in rules:
        different.append(
            f"  boundary rule: the contract says {str(rule)!r}, this route serves "
            f"{', '.join(map(repr, rules))}"
        )
    if different:
        raise ContractError(
            f"the decoder in {folder} was trained over {contract.base_id!r} and cannot be served "
            "here:\n" + "\n".join(different)
        )
    if rule.kind != "generation_prompt":
        return Boundary(rule)
    return Boundary(rule, _header(Path(folder), contract))


def is_decoder(folder: Path | str) -> bool:
    """Whether a folder carries a contract."""
    return (Path(folder) / CONTRACT_NAME).is_file()


def check_consumer(vllm_config: Any) -> None:
    """Refuse an instance that is to read the base's K/V and runs no decoder: the base itself, say.

    Raises:
        VllmError: names its model.
    """
    model = vllm_config.model_config.model
    if not is_decoder(model) and vllm_config.lora_config is None:
        raise VllmError(
            f"kv_role is kv_consumer, but {model} has no {CONTRACT_NAME} and there are no LoRA "
            "decoders: is this the base's folder? Give the decoder's, or --enable-lora"
        )


def serving_fingerprint(base: str | None, declared: str | None, model: str) -> str:
    """Fingerprint of the base that prefills, and whether an instance's own model is what it says.

    Args:
        base: folder or hub id of the base, from the instance's options.
        declared: its fingerprint, likewise; spares reading the weights.
        model: what the instance itself loads: the base, or a decoder with full weights.

    Raises:
        ContractError: the two options disagree, or the model is neither that base nor a decoder.
        VllmError: a base cannot be read.
    """
    named = base_fingerprint(base) if base else declared
    if base and declared and named != declared:
        raise ContractError(
            f"base_fingerprint is {declared}, but the base {base} has the fingerprint {named}"
        )
    if is_decoder(model):
        if named is None:
            raise ContractError(
                f"{model} is a decoder: name the base that prefills for it, by base or "
                "base_fingerprint in kv_connector_extra_config"
            )
        return named
    found = base_fingerprint(model)
    if named is not None and named != found:
        raise ContractError(
            f"{model} has no {CONTRACT_NAME}, so it must be the base, but its fingerprint is "
            f"{found} and the base's is {named}"
        )
    return found


def _header(folder: Path, contract: Contract) -> tuple[int, ...]:
    """Of an aLoRA-format adapter its invocation tokens; else what its template opens answers by."""
    config = folder / "adapter_config.json"
    if config.is_file():
        tokens = json.loads(config.read_text()).get("alora_invocation_tokens")
        if tokens:
            return tuple(tokens)
    from prefillshare_train.data import DataError, saved_renderer
    from prefillshare_train.data.generation_header import generation_header

    try:
        return generation_header(saved_renderer(folder, contract.prompt))
    except (DataError, OSError, KeyError) as error:
        raise ContractError(
            f"the decoder in {folder} has the boundary rule generation_prompt, and its assistant "
            f"header cannot be told: {error}"
        ) from error
