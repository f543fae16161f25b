"""A directory of K/V blocks that several processes write and read at once.

    ROOT/.lock, .bytes             one counter of all bytes, changed under the lock
    ROOT/writers/ID                held locked by a running process; unlocked once it is gone
    ROOT/NAMESPACE/KEY.safetensors a block: written beside under the writer's name, then renamed
    ROOT/NAMESPACE/KEY.prefills/ID a writer that is prefilling this prompt
    ROOT/NAMESPACE/ID-RANDOM.tmp   a block that is being written, or that is lent to a worker

The budget holds for the blocks; each writer has one more under way at most.
A block is whole or absent. Readers map files, so a block that is evicted while it is read stays
readable to them. Times of change order the eviction: readers touch what they use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prefillshare_train.engines.vllm.block_files import checksum, opened_block, touch_file
from prefillshare_train.engines.vllm.errors import VllmError

_BLOCK = ".safetensors"
_PREFILLS = ".prefills"
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

    def touch(self, keys: Sequence[str]) -> set[str]:
        """Those of a prompt's blocks that are there, now the most recently used of all."""
        found = set()
        # The first block is touched last: of one prompt, the end goes before what it builds on.
        for key in reversed(keys):
            with contextlib.suppress(OSError):
                touch_file(self._path(key))
                found.add(key)
        return found

    def write(self, key: str, block: Tensor) -> bool:
        """Keep a block, unless it is there already.

        Args:
            block: K/V of every layer, contiguous, on the CPU.

        Returns:
            Whether it is there now; not so where it alone is larger than the budget.

        Raises:
            OSError: it cannot be written, though older blocks made room for it.
        """
        path = self._path(key)
        if path.exists():
            return True
        beside = self._beside()
        about = {"key": key, "crc32": str(checksum(block)) if self._checksums else ""}
        try:
            # Not `save_file`, which writes under a name of its own that `_clean` does not know, and
            # whose error on a full disk is no OSError.
            self._write(beside, save({"kv": block}, metadata=about))
            size = beside.stat().st_size
            touch_file(beside)
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

    def _write(self, file: Path, content: bytes) -> None:
        """Where the file system is full below the budget, the oldest blocks go first there too."""
        try:
            file.write_bytes(content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with self._lock():
                self._evict(int(self._used() * _KEPT_SHARE) - len(content))
            file.write_bytes(content)

    def read(self, keys: Sequence[str]) -> list[Tensor]:
        """The blocks of the longest run of keys that are there, mapped and checked.

        They stay readable when they are evicted in the meantime. Files that are not what was
        written are removed and counted, all of them, so that one more prefill replaces them.
        """
        blocks: list[Tensor] = []
        damaged = self.counts["corrupt_blocks"]
        for place, key in enumerate(keys):
            block = self._read(key)
            if block is not None and place == len(blocks):
                blocks.append(block)
            elif self.counts["corrupt_blocks"] == damaged:
                break
        self.touch(keys[: len(blocks)])
        return blocks

    def _read(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            with opened_block(path) as opened:
                about = opened.metadata() or {}
                block: Tensor = opened.get_tensor("kv")
            sound = about.get("key") == key and (
                not self._checksums or about.get("crc32") in ("", str(checksum(block)))
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
        mark = self._mark(key)
        with contextlib.suppress(OSError):  # who finds no mark misses instead of waiting
            while True:
                mark.mkdir(exist_ok=True)
                try:
                    (mark / self.id).touch()
                    return
                except FileNotFoundError:  # another's end removed the folder in between
                    continue

    def end(self, key: str, writer: str | None = None) -> None:
        """Take back `begin`: the prompt's blocks are there, or will not be.

        Args:
            writer: `id` of the store that began it; this one where None.
        """
        with contextlib.suppress(OSError):
            mark = self._mark(key)
            (mark / (writer or self.id)).unlink()
            mark.rmdir()

    def pending(self, key: str) -> bool:
        """Whether a process that still runs is prefilling this prompt."""
        try:
            writers = [path.name for path in self._mark(key).iterdir()]
        except OSError:
            return False
        return any(writer == self.id or self._runs(writer) for writer in writers)

    # Files

    def _beside(self) -> Path:
        """A name that nobody has, which `_clean` removes once this process is gone."""
        return self._folder / f"{self.id}-{uuid.uuid4().hex}{_UNFINISHED}"

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_BLOCK}"

    def _mark(self, key: str) -> Path:
        return self._folder / f"{key}{_PREFILLS}"

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
        for path in self._root.glob(f"*/*{_PREFILLS}/*"):
            if path.name not in left:
                path.unlink(missing_ok=True)
        for path in self._root.glob(f"*/*{_PREFILLS}"):
            with contextlib.suppress(OSError):  # another prefill of that prompt is under way
                path.rmdir()
