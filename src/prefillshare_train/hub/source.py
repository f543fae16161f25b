"""A decoder's folder, wherever the decoder is."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from prefillshare_train.core.contract import CONTRACT_NAME, ContractError
from prefillshare_train.hub.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a decoder consists of: never a pickle, nor code.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def decoder_folder(name: Path | str, revision: str | None = None) -> Path:
    """The folder of a decoder, downloaded where `name` is a hub id.

    Args:
        name: a folder, or `owner/name` on the hub.
        revision: commit, tag or branch on the hub.

    Raises:
        HubError: there is neither such a folder nor such a repository, or it cannot be reached.
        ContractError: it is there and is not a decoder of this library.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise HubError(f"{name} is neither a folder nor a hub id (owner/name)")
    try:
        place = Path(snapshot_download(str(name), revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(
            f"{name} is no folder here, and could not be had from the hub: {error}"
        ) from error
    if not (place / CONTRACT_NAME).is_file():
        raise ContractError(
            f"{name} has no {CONTRACT_NAME}: it is not a decoder trained by this library"
        )
    return place
