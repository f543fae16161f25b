"""An exported decoder onto the hub: one commit, private unless asked otherwise."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import CHAT_TEMPLATE_DIR

from prefillshare_train.core.contract import Contract
from prefillshare_train.hub.card import is_hub_id
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.export import ExportOptions, checkpoint_folder, export_decoder
from prefillshare_train.hub.source import HUB_ID

_SCHEME = "hf://"

# Of an earlier push to the same place. Left there, shards or an adapter of another decoder would be
# loaded along with this one.
_OURS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json",
         "generation_config.json", "chat_template.jinja", "tokenizer*", "recipe.yaml")  # fmt: skip
# Faults of the transport. The client library under huggingface_hub has changed its name between
# releases; the class from which HTTP errors derive has not.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to publish.

    Attributes:
        revision: branch; made where there is none.
        message: of the commit.
        public: let everybody see it.
    """

    revision: str = "main"
    message: str | None = None
    public: bool = False


def hub_target(text: str) -> str | None:
    """The hub id that `--to` names, or None where it names a folder.

    `owner/name` is a hub id unless there is a folder `owner` here, `hf://owner/name` always.

    Raises:
        HubError: what follows `hf://` is no hub id.
    """
    name = text.removeprefix(_SCHEME)
    if not HUB_ID.fullmatch(name):
        if name != text:
            raise HubError(f"--to {text}: give hf://owner/name")
        return None
    return name if name != text or not Path(name).parent.is_dir() else None


def publish_decoder(
    checkpoint: Path, repo_id: str, export: ExportOptions, push: PushOptions
) -> str:
    """Export a checkpoint and push what was written; nothing stays on disk.

    Exporting again writes the same bytes, so that a push which broke off goes on.

    Returns:
        Address of the commit.

    Raises:
        HubError, ContractError, DataError: see `export_decoder` and `push_decoder`.
    """
    checkpoint = checkpoint_folder(checkpoint)
    _check_shareable(export.base_id or Contract.load(checkpoint).base_id)
    # Beside the checkpoint: weights may not fit where temporary files go.
    beside = checkpoint.resolve().parent
    try:
        place = tempfile.TemporaryDirectory(prefix=".export-", dir=beside)
    except OSError as error:
        raise HubError(
            f"{beside} cannot be written to, where the decoder is put together: {error}. Copy the "
            "checkpoint to a place that can be"
        ) from error
    with place as folder:
        out = export_decoder(checkpoint, Path(folder) / "decoder", export, name=repo_id)
        return push_decoder(out, repo_id, push)


def push_decoder(folder: Path, repo_id: str, options: PushOptions) -> str:
    """Upload an exported decoder in one commit, so that nobody ever loads half of one.

    When it fails, the same call goes on: files that are on the hub already are not sent again.

    Args:
        folder: what `export_decoder` wrote.
        repo_id: `owner/name`.

    Returns:
        Address of the commit.

    Raises:
        HubError: the base's name means nothing to others, the repository is public and `public` is
            False, the hub refuses, or the transfer broke off.
        ContractError: the folder is no decoder.
    """
    contract = Contract.load(folder)
    _check_shareable(contract.base_id)
    api = HfApi()
    with _told(repo_id):
        api.create_repo(repo_id, private=not options.public, exist_ok=True)
        if not options.public and not api.repo_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and everybody can see it: add --public, or name another"
            )
        if options.revision != "main":
            api.create_branch(repo_id, branch=options.revision, exist_ok=True)
        paths = _files(folder)
        there = api.list_repo_files(repo_id, revision=options.revision)
        stale = [name for name in there if name not in paths and _is_ours(name)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
                *(CommitOperationAdd(name, path) for name, path in paths.items()),
            ],
            commit_message=options.message or f"Decoder for {contract.base_id}",
            revision=options.revision,
        )
    return str(commit.commit_url)


def _check_shareable(base_id: str) -> None:
    """What can be told before any weight is read."""
    if not is_hub_id(base_id):
        raise HubError(
            f"the decoder's base is called {base_id!r}, which nobody else can load: name its hub "
            "id with --base owner/name"
        )
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set: unset it to push, or export to a folder")


def _files(folder: Path) -> dict[str, Path]:
    """All files by their names on the hub, but for those in hidden folders such as `.git`."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts[:-1])
    }


def _is_ours(name: str) -> bool:
    place, _, file = name.rpartition("/")
    if place:
        return place == CHAT_TEMPLATE_DIR and file.endswith(".jinja")
    return any(fnmatch.fnmatch(name, pattern) for pattern in _OURS)


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (_TRANSPORT_ERROR, OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"the hub does not let you write to {repo_id}: {_first_line(error)}. Log in with "
                "`hf auth login`, with a token that may write there"
            ) from error
        cause = _first_line(error)
        if error.__cause__ is not None:
            cause += f" ({_first_line(error.__cause__)})"
        raise HubError(
            f"pushing to {repo_id} broke off: {cause}. Run the same command again; files that "
            "arrived are not sent twice, and nothing shows before all of them have"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
