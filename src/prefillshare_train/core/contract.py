"""What a decoder was trained against, saved beside its weights and checked by every loader.

A decoder is only right over the very base, tokenizer, template and boundary that it was trained
with. Loading it over another base, or as an ordinary model, gives fluent and wrong text without an
error; the contract turns that into a refusal that names both values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prefillshare_train.core.boundary import BoundaryRule

CONTRACT_NAME = "prefillshare_contract.json"
_VERSION = 1
_CACHE_KEYS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "rope_parameters",
    "partial_rotary_factor",
    "no_rope_layers",
    "sliding_window",
    "layer_types",
)


class ContractError(ValueError):
    """A decoder's contract is missing, unreadable, or does not fit what it is loaded over."""


@dataclass(frozen=True)
class Contract:
    """Everything that shapes the cache a decoder reads and the prompt it sees.

    Attributes:
        base_id: hub id or path that the base was loaded from (for people; the fingerprint decides).
        base_revision: commit, tag or branch, or None.
        base_fingerprint: `weights_fingerprint` of the base.
        cache_config: the configuration values that fix the K/V geometry and RoPE.
        prompt: fingerprints of tokenizer and template, from `data.Renderer.prompt_contract()`.
        boundary: the boundary rule, as text.
        kv_dtype: dtype in which the decoder read the base's K/V in training.
        method: `prefillshare`, or `full_prompt` for a decoder that never read a base's cache.
        adapter: `none` or `lora`.
        version: format of this file.
    """

    base_id: str
    base_revision: str | None
    base_fingerprint: str
    cache_config: dict[str, Any]
    prompt: dict[str, Any]
    boundary: str
    kv_dtype: str
    method: str = "prefillshare"
    adapter: str = "none"
    version: int = field(default=_VERSION)

    @property
    def rule(self) -> BoundaryRule:
        """The boundary rule, parsed."""
        return BoundaryRule.parse(self.boundary)

    def save(self, folder: Path) -> Path:
        """Write the contract into a checkpoint folder: complete or not at all."""
        path = folder / CONTRACT_NAME
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")
        beside.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path) -> Contract:
        """Read the contract of a decoder's folder.

        Raises:
            ContractError: there is none, it is not readable, or a newer version wrote it.
        """
        path = folder / CONTRACT_NAME
        if not path.is_file():
            raise ContractError(
                f"{folder} has no {CONTRACT_NAME}: it is not a decoder trained by this library, "
                "and nothing says which base's cache it can read"
            )
        try:
            values = json.loads(path.read_text())
            names = {f.name for f in dataclasses.fields(cls)}
            if values["version"] > _VERSION:
                raise ContractError(
                    f"{path} has version {values['version']}; this library reads up to "
                    f"{_VERSION}. Upgrade prefillshare-train"
                )
            return cls(**{k: v for k, v in values.items() if k in names})
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ContractError):
                raise
            raise ContractError(f"{path} is not a contract: {error}") from error

    def kv_dtype_difference(self, dtype: torch.dtype) -> str:
        """What to say where the base's K/V have another dtype than in training; "" if not.

        Apart from `verify`: rounding shifts answers a little where another base makes nonsense, so
        that a user may ask for it.
        """
        here = str(dtype).removeprefix("torch.")
        if here == self.kv_dtype:
            return ""
        return f"trained on K/V in {self.kv_dtype}, and the base makes them in {here}"

    def verify(
        self,
        *,
        base_fingerprint: str | None = None,
        config: PreTrainedConfig | None = None,
        prompt: dict[str, Any] | None = None,
        boundary: BoundaryRule | None = None,
    ) -> None:
        """Check what a decoder is about to be run over; only what is given is compared.

        Raises:
            ContractError: anything differs. The message lists each difference with both values.
        """
        found: dict[str, tuple[Any, Any]] = {}
        if base_fingerprint is not None:
            found["base fingerprint"] = (self.base_fingerprint, base_fingerprint)
        if config is not None:
            here = cache_config(config)
            for key in sorted({*here, *self.cache_config}):
                found[f"base config {key}"] = (self.cache_config.get(key), here.get(key))
        if prompt is not None:
            for key in sorted({*prompt, *self.prompt}):
                found[f"prompt {key}"] = (self.prompt.get(key), prompt.get(key))
        if boundary is not None:
            found["boundary rule"] = (self.boundary, str(boundary))
        different = [
            f"  {name}: trained with {trained!r}, found {here!r}"
            for name, (trained, here) in found.items()
            if trained != here
        ]
        if different:
            raise ContractError(
                f"this decoder was trained over {self.base_id!r}"
                f"{f' at {self.base_revision}' if self.base_revision else ''} and does not fit "
                "what it is loaded over:\n" + "\n".join(different)
            )


def cache_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration values that fix the K/V geometry and RoPE, as JSON values."""
    values = {key: getattr(config, key, None) for key in _CACHE_KEYS}
    kept = {key: value for key, value in values.items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every weight's name, shape and content.

    Contents are rounded to bfloat16 first, so that one checkpoint has one fingerprint whether it is
    loaded in float32 or in bfloat16; a fine-tuned copy differs all the same. Adapter weights are
    left out, and PEFT's renaming of wrapped layers is undone, so that it can be taken at any time.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    named = dict(_base_weights(model))
    return fingerprint_of(named, named.__getitem__)


def fingerprint_of(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """`weights_fingerprint` of a model that is not in memory.

    Args:
        names: of its parameters, tied ones once.
        read: gives the tensor of a name; called from several threads.
    """
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = list(pool.map(lambda name: _tensor_digest(name, read(name)), sorted(names)))
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def _base_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        clean = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        yield clean, tensor


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    hasher = hashlib.sha256(f"{name} {tuple(tensor.shape)}\n".encode())
    rows = tensor.detach().flatten()
    step = 1 << 24
    for start in range(0, rows.numel(), step):
        piece = rows[start : start + step].to("cpu", torch.bfloat16).contiguous()
        hasher.update(piece.view(torch.uint8).numpy().data)
    return hasher.digest()
