"""What `prefillshare bench` measures: engines in this process, or a server."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from prefillshare_train.core.contract import CONTRACT_NAME
from prefillshare_train.data import DataError, make_renderer
from prefillshare_train.data.generation_header import plain_header
from prefillshare_train.serving.config import EngineConfig, Mode
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.kv_storage import KVGeometry
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.points import ClientFactory, LoadPoint
from prefillshare_train.workloads.run import Grid

_DECODER_FILES = (CONTRACT_NAME, "config.json", "adapter_config.json", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Target:
    """What is measured.

    Attributes:
        client_of: the system for each load point.
        header: tokens that open an answer, for prompts that are drawn; none where they are sent as
            text, or the template has no such tokens.
        device: that the engine computes on; None for a server's, which is not known.
        token_bytes: K/V bytes of one token; None where it is not known.
        server_start: see `PointStore`.
        identity: `identity_of` what is measured; empty for a server, which has its start.
    """

    client_of: ClientFactory
    header: tuple[int, ...]
    device: str | None = None
    token_bytes: int | None = None
    server_start: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


def names_of(decoders: Sequence[str], *, served: bool) -> tuple[str, ...]:
    """Names in the order of being called.

    Args:
        decoders: `name=folder`, or names where a server has them.

    Raises:
        WorkloadError: one has no name or no folder, or a name comes twice.
    """
    names = tuple(decoders) if served else tuple(_folders(decoders))
    if len(set(names)) != len(decoders):
        raise WorkloadError(f"--decoder: a name comes twice in {', '.join(decoders)}")
    return names


def modes_of(mode: Literal["shared", "isolated", "both"], *, served: bool) -> tuple[Mode, ...]:
    """Modes to run; a server has one, whatever it is called here."""
    if mode == "both":
        return ("shared",) if served else ("shared", "isolated")
    return (mode,)


def engines(
    base: str,
    decoders: Sequence[str],
    dtype: str | None,
    device: str | None,
    *,
    max_decode_rows: int,
) -> Target:
    """A fresh engine for each load point, all on one copy of the models."""
    folders = _folders(decoders)
    models = ServedModels.load(
        base,
        folders,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
    )

    def engine(point: LoadPoint) -> Engine:
        return Engine(models, engine_config(point, max_decode_rows))

    return Target(
        lambda point: in_process(engine(point)),
        plain_header(models.renderer),
        device=str(models.base.device),
        token_bytes=KVGeometry.of(models.base).token_bytes,
        identity=identity_of(models, folders),
    )


def identity_of(models: ServedModels, decoders: Mapping[str, Path]) -> dict[str, Any]:
    """What tells models from others that lay under the same paths, as JSON values.

    Args:
        decoders: folders that `models` were loaded from, by name.

    Returns:
        The base's fingerprint, and of each decoder a digest of its contract, configuration and
        weights.
    """
    return {
        "base": models.base_fingerprint,
        "decoders": {name: decoder_digest(folder) for name, folder in decoders.items()},
    }


def engine_config(point: LoadPoint, max_decode_rows: int = 16) -> EngineConfig:
    """The engine's options for a load point; its queue holds every session that may run."""
    return EngineConfig(
        mode=point.mode,
        kv_bytes=point.kv_bytes,
        max_decode_rows=max_decode_rows,
        chunk_tokens=max(256, 2 * max_decode_rows),
        max_waiting=max(256, 2 * point.max_sessions),
        staging_bytes=point.staging_bytes,
        session_tokens=point.session_tokens,
    )


def http_server(
    url: str,
    api: Literal["completions", "chat"],
    tokenizer: PreTrainedTokenizerBase,
    api_key: str | None,
    timeout_s: float,
    *,
    extensions: bool,
    resume: bool,
) -> Target:
    """One server for all load points, each of which finds nothing of the others in its cache.

    Args:
        extensions: see `HttpClient`.
        resume: take finished points of whatever start of the server.

    Raises:
        WorkloadError: nobody answers there.
    """
    from prefillshare_train.workloads.http_client import HttpClient  # needs the extra `serve`

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def client(point: LoadPoint) -> HttpClient:
        return HttpClient(
            url,
            api=api,
            decode=decode,
            encode=encode,
            api_key=api_key,
            timeout_s=timeout_s,
            extensions=extensions,
            # Its warm-up and its sessions share one; other points and earlier runs have others.
            cache_salt=secrets.token_hex(8) if extensions else None,
        )

    return Target(
        client,
        () if api == "chat" else _header_of(tokenizer),
        server_start=None if resume else _server_start(url, api_key),
    )


def require_one_load(grid: Grid) -> None:
    """Refuse loads that would find the caches of those before them.

    Raises:
        WorkloadError: there are several.
    """
    if (count := len(grid.points())) > 1:
        raise WorkloadError(
            f"--no-extensions sends no cache_salt, so that of {count} loads all but the first "
            "would find their prompts cached: give one --rate, one --max-sessions and --repeats "
            "1, and restart the server or change --seed between runs"
        )


def refuse_with_a_trace(options: Mapping[str, object]) -> None:
    """Refuse options that a trace decides by itself.

    Raises:
        WorkloadError: one is not None.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise WorkloadError(
            f"{', '.join(given)}: a trace has its own sessions and arrivals; leave it out "
            "(--speed replays a trace faster or slower)"
        )


def _header_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        return plain_header(make_renderer(tokenizer))
    except DataError:  # a base without a chat template
        return ()


def _server_start(url: str, api_key: str | None) -> str:
    """What names the start of the server; of one that does not tell it, no two names are equal.

    Our servers tell it as the time at which their models were created. With others that is the
    time of the question, or a constant.
    """
    import httpx  # needs the extra `serve`

    address = f"{url.rstrip('/')}/v1/models"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(address, headers=headers, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise WorkloadError(
            f"--url {url}: nobody answers at {address} ({type(error).__name__}: {error}). Start "
            "the server, or correct the address"
        ) from error
    try:
        models: list[dict[str, Any]] = answer.json()["data"]
        ours = [model["created"] for model in models if model["owned_by"] == "prefillshare"]
    except (ValueError, KeyError, TypeError):
        ours = []
    return f"created {ours[0]}" if ours else secrets.token_hex(8)


def decoder_digest(folder: Path) -> str:
    """Digest of a decoder's contract, configuration and weights, bit by bit."""
    hasher = hashlib.sha256()
    for path in sorted(path for pattern in _DECODER_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            hasher.update(f"{path.name}\n".encode())
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


def _folders(decoders: Sequence[str]) -> dict[str, Path]:
    found = {}
    for text in decoders:
        name, _, folder = text.partition("=")
        if not folder or not Path(folder).is_dir():
            raise WorkloadError(
                f"--decoder {text}: give name=folder, where the folder is a decoder's"
            )
        found[name] = Path(folder)
    return found
