"""A directory of K/V blocks that several processes write and read at once.

    ROOT/.lock, .bytes             one counter of all bytes, changed under the lock
    ROOT/writers/ID                held locked by a running process; unlocked once it is gone
    ROOT/NAMESPACE/KEY.safetensors a block: written beside under the writer's name, then renamed
    ROOT/NAMESPACE/KEY.pending     names the writer that is prefilling this prompt
    ROOT/NAMESPACE/ID-RANDOM.tmp   a block that is being written, or that is lent to a worker

The budget holds for the blocks; each writer has one more under way at most.
A block is whole or absent. Readers map files, so a block that is evicted while it is read stays
readable to them. Times of change order the eviction: readers touch what they use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prefillshare_train.engines.vllm.errors import VllmError

_BLOCK = ".safetensors"
_PENDING = ".pending"
_UNFINISHED = ".tmp"
# Evicting looks at every file, so it makes room for more than the one block at hand.
_KEPT_SHARE = 0.9


class BlockStore:
    """One process's view of the directory.

    Args:
        root: folder of the store, made where it is not there; in memory (`/dev/shm`) or on disk.
        namespace: blocks of other namespaces lie beside these and share the budget.
        budget_bytes: of all files together; the least recently used blocks go first. Every process
            should be given the same.
        checksums: compare each block's bytes with what was written. Truncated files are found
            without.

    Attributes:
        id: of this process, among those that write.
        counts: what happened, by name: `written_blocks`, `written_bytes`, `evicted_blocks`,
            `corrupt_blocks`, and `dropped_blocks`, larger than the budget. Callers may reset it.

    Raises:
        VllmError: the folder cannot be made or written.
    """

    def __init__(
        self, root: Path | str, namespace: str, budget_bytes: int, *, checksums: bool = True
    ) -> None:
        self._root = Path(root)
        self._folder = self._root / namespace
        self._writers = self._root / "writers"
        self._budget = budget_bytes
        self._checksums = checksums
        self.id = uuid.uuid4().hex
        self.counts: Counter[str] = Counter()
        try:
            # Prompts can be told from their K/V: other users may not read them.
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.mkdir(exist_ok=True)
            self._writers.mkdir(exist_ok=True)
            with self._lock():
                self._alive = (self._writers / self.id).open("w")
                fcntl.flock(self._alive, fcntl.LOCK_EX)
                self._clean()
                self._evict(self._budget)
        except OSError as error:
            raise VllmError(
                f"the block store in {self._root} cannot be used: {error}. Choose another path"
            ) from error

    def close(self) -> None:
        """Give up this process's place; others then clean up what it left unfinished."""
        if not self._alive.closed:
            with contextlib.suppress(OSError):
                (self._writers / self.id).unlink()
            self._alive.close()

    # Blocks

    def has(self, key: str) -> bool:
        """Whether a block is there, now."""
        return self._path(key).exists()

    def write(self, key: str, block: Tensor) -> bool:
        """Keep a block, unless it is there already.

        Args:
            block: K/V of every layer, contiguous, on the CPU.

        Returns:
            Whether it is there now; not so where it alone is larger than the budget.
        """
        path = self._path(key)
        if path.exists():
            return True
        beside = self._beside()
        about = {"key": key, "crc32": str(_crc32(block)) if self._checksums else ""}
        try:
            # Not `save_file`, which writes under a name of its own that `_clean` does not know, and
            # whose error on a full disk is no OSError.
            beside.write_bytes(save({"kv": block}, metadata=about))
            size = beside.stat().st_size
            _touch(beside)
            with self._lock():
                if path.exists():
                    return True
                if self._used() + size > self._budget:
                    self._evict(min(int(self._budget * _KEPT_SHARE), self._budget - size))
                if self._used() + size > self._budget:
                    self.counts["dropped_blocks"] += 1
                    return False
                # Counted first: a crash in between makes the store look fuller, never emptier.
                self._set_used(self._used() + size)
                beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
        self.counts["written_blocks"] += 1
        self.counts["written_bytes"] += size
        return True

    def read(self, keys: Sequence[str]) -> list[Tensor]:
        """The blocks of the longest run of keys that are there, mapped and checked.

        They stay readable when they are evicted in the meantime. A file that is not what was
        written is removed and counted.
        """
        blocks = []
        for key in keys:
            block = self._read(key)
            if block is None:
                break
            blocks.append(block)
        # The first block is touched last: of one prompt, the end goes before what it builds on.
        for key in reversed(keys[: len(blocks)]):
            with contextlib.suppress(OSError):
                _touch(self._path(key))
        return blocks

    def _read(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            with _opened(path) as opened:
                about = opened.metadata() or {}
                block: Tensor = opened.get_tensor("kv")
            sound = about.get("key") == key and (
                not self._checksums or about.get("crc32") in ("", str(_crc32(block)))
            )
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError):
            sound = False
        if sound:
            return block
        self.counts["corrupt_blocks"] += 1
        with self._lock():
            self._remove(path)
        return None

    def lend(self, key: str) -> Path | None:
        """A second name of a block, under which another process finds it whatever is evicted.

        Returns:
            The file, for `take`; None where the block is gone, or files here have one name only.
        """
        loan = self._beside()
        try:
            os.link(self._path(key), loan)
        except OSError:
            return None
        return loan

    @staticmethod
    def take(loan: Path) -> Tensor:
        """Read a block that was lent, and give the name back."""
        with safe_open(str(loan), "pt") as opened:
            block: Tensor = opened.get_tensor("kv")
        loan.unlink()
        return block

    # Prompts in flight

    def begin(self, key: str) -> None:
        """Say that this process is prefilling the prompt whose last block has this key."""
        beside = self._beside()
        with contextlib.suppress(OSError):  # who finds no mark misses instead of waiting
            beside.write_text(self.id)
            beside.rename(self._mark(key))

    def end(self, key: str, writer: str | None = None) -> None:
        """Take back `begin`: the prompt's blocks are there, or will not be.

        Args:
            writer: `id` of the store that began it; this one where None.
        """
        with contextlib.suppress(OSError):
            mark = self._mark(key)
            if mark.read_text() == (writer or self.id):
                mark.unlink()

    def pending(self, key: str) -> bool:
        """Whether a process that still runs is prefilling this prompt."""
        try:
            writer = self._mark(key).read_text()
        except OSError:
            return False
        return writer == self.id or self._runs(writer)

    # Files

    def _beside(self) -> Path:
        """A name that nobody has, which `_clean` removes once this process is gone."""
        return self._folder / f"{self.id}-{uuid.uuid4().hex}{_UNFINISHED}"

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_BLOCK}"

    def _mark(self, key: str) -> Path:
        return self._folder / f"{key}{_PENDING}"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _used(self) -> int:
        try:
            return int((self._root / ".bytes").read_text())
        except (OSError, ValueError):  # lost or half written: count anew
            total = sum(size for _, size, _ in self._blocks())
            self._set_used(total)
            return total

    def _set_used(self, total: int) -> None:
        (self._root / ".bytes").write_text(str(total))

    def _blocks(self) -> list[tuple[int, int, Path]]:
        """Time of change, bytes and path of every block of every namespace."""
        found = []
        for path in self._root.glob(f"*/*{_BLOCK}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _evict(self, target: int) -> None:
        """Remove the least recently used blocks until `target` bytes are left; set the counter."""
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if total <= target:
                break
            path.unlink(missing_ok=True)
            total -= size
            self.counts["evicted_blocks"] += 1
        self._set_used(total)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._set_used(max(0, self._used() - size))

    def _runs(self, writer: str) -> bool:
        """Whether a process holds its place; the place of one that is gone is removed."""
        path = self._writers / writer
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        path.unlink(missing_ok=True)
        return False

    def _clean(self) -> None:
        """Remove what writers that are gone left unfinished."""
        for path in self._writers.iterdir():
            if path.name != self.id:
                self._runs(path.name)
        left = {path.name for path in self._writers.iterdir()}
        for path in self._root.glob(f"*/*{_UNFINISHED}"):
            if path.name.split("-")[0] not in left:
                path.unlink(missing_ok=True)
        for path in self._root.glob(f"*/*{_PENDING}"):
            with contextlib.suppress(OSError):
                if path.read_text() not in left:
                    path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A block's file for `safetensors`, whole even where it is evicted meanwhile.

    `safe_open` opens the name it is given twice, for the header and then, by torch, for the tensor.
    The descriptor's own name leads to one file whatever happens to the block's.
    """
    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", "pt") as opened:
        yield opened


def _touch(path: Path) -> None:
    # The file system's own clock is too coarse to tell a prompt's blocks apart.
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _crc32(block: Tensor) -> int:
    return zlib.crc32(block.flatten().view(torch.uint8).numpy().data)
