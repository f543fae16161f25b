"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from prefillshare_train.hub.errors import HubError


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `place` when the block ends without an error.

    Raises:
        HubError: `place` holds something already or cannot be made, or files could not be read or
            written.
    """
    target = place.resolve()
    beside = target.with_name(f".unfinished-{target.name}-{os.getpid()}")
    try:
        _check_free(place)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        readable = beside.stat().st_mode & 0o666  # what the user's umask leaves
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # safetensors writes for its owner only
            _flush(path)
        _flush(beside)
        beside.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk is either, by who meets it
        raise HubError(f"writing {place} failed, and nothing was left there: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_free(place: Path) -> None:
    if place.is_dir():
        held = next(place.iterdir(), None)
        if held is None:
            return
        raise HubError(f"{place} already holds {held.name}; name another folder, or remove it")
    if place.exists():
        raise HubError(f"{place} is a file; name a folder")


def _flush(path: Path) -> None:
    """On disk, so that the rename cannot outrun the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
