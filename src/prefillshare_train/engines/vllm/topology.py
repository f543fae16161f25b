"""What is deployed: a base, its decoders, the route between them, and the pools that follow.

    store, nixl                              lora
    prefill pool: the base                   one pool: the base with all adapters,
    one pool a full decoder                  which prefills and decodes
    LoRA decoders: a pool together or each

Nothing here starts a process or imports vLLM: `up` and `plan` read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.engines.vllm.errors import VllmError

Route = Literal["store", "nixl", "lora"]
Role = Literal["prefill", "decode", "both"]
BASE_NAME = "base"
"""What instances call the base; no decoder may be called so."""

_ADAPTER_CONFIG = "adapter_config.json"
_MODEL_CONFIG = "config.json"
_NAME = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,38}[A-Za-z0-9])?")
# What vLLM's `lora/peft_helper.py` refuses as it loads an adapter, which ends the process.
_NOT_IN_VLLM = (
    ("modules_to_save", "retrained modules"),
    ("use_dora", "DoRA"),
    ("lora_bias", "biases"),
    ("layer_replication", "replicated layers"),
    ("use_qalora", "QALoRA"),
)
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""
_TAKEN = (BASE_NAME, "lora", "prefill", "router")


@dataclass(frozen=True)
class Decoder:
    """One decoder as it lies in its folder.

    Attributes:
        name: what clients call it, as `model`.
        folder: its weights or adapter, with the contract.
        contract: what it was trained against.
        rank: of its adapter; None for a full decoder.
        invocation_tokens: of an adapter in the aLoRA format; empty otherwise.
    """

    name: str
    folder: Path
    contract: Contract
    rank: int | None = None
    invocation_tokens: tuple[int, ...] = ()

    @property
    def lora(self) -> bool:
        """Whether it is an adapter over the base's weights."""
        return self.rank is not None


@dataclass(frozen=True)
class Pool:
    """Instances that are started alike and take each other's requests.

    Attributes:
        name: `prefill`, `decode-NAME`, `decode-lora`, or `lora`.
        role: what its instances do.
        model: the folder or hub id that they load.
        adapters: the LoRA decoders that they serve besides.
        serves: the decoders that the router sends here.
        replicas: how many instances.
    """

    name: str
    role: Role
    model: str
    adapters: tuple[Decoder, ...]
    serves: tuple[str, ...]
    replicas: int

    @property
    def max_lora_rank(self) -> int:
        """The least value of vLLM's `--max-lora-rank` that holds every adapter of the pool."""
        highest = max((decoder.rank or 0) for decoder in self.adapters)
        return next(rank for rank in _LORA_RANKS if rank >= highest)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A deployment, checked as far as its parts can be without loading weights.

    Attributes:
        base: folder or hub id of the base.
        decoders: at least one.
        route: how K/V get from the base to the decoders.
        prefill_replicas: instances of the base; of the one pool, on the route `lora`.
        decode_replicas: instances of each decode pool.
        lora_together: whether LoRA decoders share a decode pool, and so the base's weights, or
            have one each, which then scale alone. The route `lora` has one pool in any case.

    Raises:
        VllmError: names or folders occur twice, or the route cannot serve these decoders.
    """

    base: str
    decoders: tuple[Decoder, ...]
    route: Route
    prefill_replicas: int = 1
    decode_replicas: int = 1
    lora_together: bool = True

    def __post_init__(self) -> None:
        if not self.decoders:
            raise VllmError("there is no decoder to serve: give --decoder NAME=FOLDER")
        if self.route not in get_args(Route):
            raise VllmError(f"route {self.route!r} is none of {', '.join(get_args(Route))}")
        if min(self.prefill_replicas, self.decode_replicas) < 1:
            raise VllmError("each pool needs at least one replica")
        _check_distinct(self.base, self.decoders)
        for decoder in self.decoders:
            self._check_route(decoder)
        labels: dict[str, str] = {}
        for decoder in self.decoders:
            other = labels.setdefault(host_label(decoder.name), decoder.name)
            if other != decoder.name:
                raise VllmError(f"decoders {other} and {decoder.name} would name one host")

    def _check_route(self, decoder: Decoder) -> None:
        if self.route == "lora" and not decoder.lora:
            raise VllmError(
                f"decoder {decoder.name} ({decoder.folder}) has full weights, and one process "
                "holds the weights of one model: use --route store or nixl in place of --lora"
            )
        if self.route == "nixl" and decoder.invocation_tokens:
            raise VllmError(
                f"decoder {decoder.name} ({decoder.folder}) is an aLoRA-format adapter: its "
                "assistant header is its own to run, and NIXL hands over all of a prompt but the "
                "last token. Use --route store or --lora"
            )

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The prefill pool first."""
        adapters = tuple(decoder for decoder in self.decoders if decoder.lora)
        if self.route == "lora":
            names = tuple(decoder.name for decoder in adapters)
            return (Pool("lora", "both", self.base, adapters, names, self.prefill_replicas),)
        pools = [Pool("prefill", "prefill", self.base, (), (), self.prefill_replicas)]
        for decoder in self.decoders:
            if not decoder.lora:
                model = str(decoder.folder)
                pools.append(
                    self._decode_pool(f"decode-{host_label(decoder.name)}", model, (), (decoder,))
                )
            elif not self.lora_together:
                name = f"decode-{host_label(decoder.name)}"
                pools.append(self._decode_pool(name, self.base, (decoder,), (decoder,)))
        if adapters and self.lora_together:
            pools.append(self._decode_pool("decode-lora", self.base, adapters, adapters))
        return tuple(pools)

    def _decode_pool(
        self, name: str, model: str, adapters: tuple[Decoder, ...], serves: Sequence[Decoder]
    ) -> Pool:
        names = tuple(decoder.name for decoder in serves)
        return Pool(name, "decode", model, adapters, names, self.decode_replicas)


def host_label(name: str) -> str:
    """A decoder's name as hosts, log files and Kubernetes take it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def parse_decoders(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` of each decoder.

    Raises:
        VllmError: a text has another form, or a name is given twice or cannot name a host.
    """
    folders = parse_pairs("--decoder", texts, form="NAME=FOLDER")
    for name, folder in folders.items():
        text = f"{name}={folder}"
        if not _NAME.fullmatch(name) or host_label(name) in _TAKEN:
            raise VllmError(
                f"--decoder {text}: the name {name!r} must be at most 40 letters, digits, hyphens, "
                f"dots and underscores, with neither end one of the last three, and none of "
                f"{', '.join(_TAKEN)}: it names hosts and log files"
            )
    return {name: Path(folder) for name, folder in folders.items()}


def parse_pairs(option: str, texts: Sequence[str], *, form: str = "NAME=VALUE") -> dict[str, str]:
    """What an option gives by name.

    Raises:
        VllmError: a text has another form, or a name is given twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise VllmError(f"{option} {text}: give {form}")
        if name in pairs:
            raise VllmError(f"{option} {text}: {name} is given twice")
        pairs[name] = value
    return pairs


def read_decoder(name: str, folder: Path) -> Decoder:
    """Look at a decoder's folder.

    Raises:
        ContractError: it has no contract that can be read.
        VllmError: it is no folder of a decoder, or an adapter that vLLM does not load.
    """
    if not folder.is_dir():
        raise VllmError(f"decoder {name}: {folder} is no folder; give a decoder's folder")
    try:
        contract = Contract.load(folder)
    except ContractError as error:
        raise ContractError(f"decoder {name}: {error}") from None
    if contract.method != "prefillshare":
        raise ContractError(
            f"decoder {name}: {folder} was trained with the method {contract.method!r}: it reads "
            "its own prompts and would answer worse from a base's cache. Serve it with vLLM alone"
        )
    if contract.adapter == "none":
        if not (folder / _MODEL_CONFIG).is_file():
            raise VllmError(f"decoder {name}: {folder} has no {_MODEL_CONFIG}, so no weights")
        return Decoder(name, folder, contract)
    settings = _json_object(folder / _ADAPTER_CONFIG, name)
    for key, what in _NOT_IN_VLLM:
        if settings.get(key):
            raise VllmError(
                f"decoder {name}: {folder / _ADAPTER_CONFIG} has {key} = {settings[key]!r}, and "
                f"vLLM does not load adapters with {what}. Merge it into a full decoder: "
                f"prefillshare export {folder} --merge --to NEW"
            )
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= _LORA_RANKS[-1]:
            raise VllmError(
                f"decoder {name}: {folder / _ADAPTER_CONFIG} has the rank {rank}; vLLM takes 1 "
                f"to {_LORA_RANKS[-1]}"
            )
    invocation = tuple(settings.get("alora_invocation_tokens") or ())
    return Decoder(name, folder, contract, max(ranks), invocation)


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise VllmError(f"decoder {name}: {path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise VllmError(f"decoder {name}: {path} holds no JSON object")
    return value


def _check_distinct(base: str, decoders: Sequence[Decoder]) -> None:
    """Where one folder is both base and decoder, every check of vLLM's passes, and all is wrong."""
    taken = {Path(base).resolve(): "the base"} if Path(base).exists() else {}
    for decoder in decoders:
        other = taken.setdefault(decoder.folder.resolve(), f"decoder {decoder.name}")
        if other != f"decoder {decoder.name}":
            raise VllmError(
                f"decoder {decoder.name} lies in {decoder.folder}, which is {other}'s folder too: "
                "each has a folder of its own"
            )
