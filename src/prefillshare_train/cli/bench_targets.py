"""What `prefillshare bench` measures: engines in this process, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from prefillshare_train.serving.config import EngineConfig, Mode
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.points import ClientFactory, LoadPoint


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
) -> ClientFactory:
    """A fresh engine for each load point, all on one copy of the models."""
    models = ServedModels.load(
        base,
        _folders(decoders),
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
    )

    def engine(point: LoadPoint) -> Engine:
        return Engine(models, engine_config(point, max_decode_rows))

    return lambda point: in_process(engine(point))


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
) -> ClientFactory:
    """One server for all load points."""
    from prefillshare_train.workloads.http_client import HttpClient  # needs the extra `serve`

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return lambda point: HttpClient(
        url, api=api, decode=decode, encode=encode, api_key=api_key, timeout_s=timeout_s
    )


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
