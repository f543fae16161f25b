"""The store: budget, eviction order, crashes, damage, and several processes at once."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prefillshare_train.engines.vllm import block_store
from prefillshare_train.engines.vllm.block_store import BlockStore
from prefillshare_train.engines.vllm.errors import VllmError

MIB = 1 << 20
FILE = 4352
"""Bytes that a block of `block` takes on disk, at most."""


def block(seed: int, size: int = 1024) -> torch.Tensor:
    return torch.full((2, size // 2), float(seed))


def key(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    made = BlockStore(tmp_path / "s", "ns", MIB)
    yield made
    made.close()


def bytes_of(root: Path) -> int:
    total = 0
    for path in root.glob("*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # evicted since it was listed
            total += path.stat().st_size
    return total


def test_what_is_written_is_read_up_to_the_first_gap(store: BlockStore) -> None:
    for number in (0, 1, 3):
        assert store.write(key(number), block(number))
    found = store.read([key(n) for n in range(4)])
    assert [int(tensor[0, 0]) for tensor in found] == [0, 1]
    assert torch.equal(found[1], block(1))
    assert store.counts["written_blocks"] == 3


def test_bfloat16_blocks_come_back_bit_for_bit(store: BlockStore) -> None:
    kept = torch.randn(3, 5, dtype=torch.bfloat16)
    store.write(key(0), kept)
    (found,) = store.read([key(0)])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, kept)


def test_a_restart_finds_the_blocks_and_another_namespace_does_not(tmp_path: Path) -> None:
    first = BlockStore(tmp_path, "ns", MIB)
    first.write(key(0), block(7))
    first.close()
    assert len(BlockStore(tmp_path, "ns", MIB).read([key(0)])) == 1
    assert BlockStore(tmp_path, "other", MIB).read([key(0)]) == []


def test_the_least_recently_used_block_goes_first(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "ns", 4 * FILE)
    for number in range(3):
        store.write(key(number), block(number))
        time.sleep(0.01)
    store.read([key(0)])
    time.sleep(0.01)
    for number in range(3, 5):
        store.write(key(number), block(number))
        time.sleep(0.01)
    assert store.has(key(0))
    assert not store.has(key(1))
    assert store.counts["evicted_blocks"] >= 1
    assert bytes_of(tmp_path) <= 4 * FILE


def test_of_one_prompt_the_end_goes_before_what_it_builds_on(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "ns", 4 * FILE)
    for number in range(3):
        store.write(key(number), block(number))
    store.read([key(n) for n in range(3)])
    store.write(key(9), block(9))
    store.write(key(10), block(10))
    assert store.has(key(0))
    assert not store.has(key(2))


def test_namespaces_share_the_budget(tmp_path: Path) -> None:
    one, other = BlockStore(tmp_path, "a", 3 * FILE), BlockStore(tmp_path, "b", 3 * FILE)
    for number in range(4):
        one.write(key(number), block(number))
        other.write(key(number), block(number))
        assert bytes_of(tmp_path) <= 3 * FILE


def test_a_block_larger_than_the_budget_is_dropped_and_counted(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "ns", FILE // 2)
    assert not store.write(key(0), block(0))
    assert store.counts["dropped_blocks"] == 1
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_block_that_is_evicted_while_it_is_opened_is_read_whole(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # safetensors has read the header by then, and hands torch the same name.
    open_again = torch.UntypedStorage.from_file

    def evicted_first(*args: Any, **named: Any) -> torch.UntypedStorage:
        store._evict(0)
        return open_again(*args, **named)

    store.write(key(0), block(5))
    monkeypatch.setattr(torch.UntypedStorage, "from_file", evicted_first)
    (held,) = store.read([key(0)])
    assert not store.has(key(0))
    assert torch.equal(held, block(5))
    assert store.counts["corrupt_blocks"] == 0


def test_a_block_that_is_evicted_while_it_is_read_stays_readable(store: BlockStore) -> None:
    store.write(key(0), block(5))
    (held,) = store.read([key(0)])
    store._evict(0)
    assert not store.has(key(0))
    assert torch.equal(held, block(5))


def test_a_lent_block_outlives_its_eviction_and_leaves_no_file(store: BlockStore) -> None:
    store.write(key(0), block(5))
    loan = store.lend(key(0))
    assert loan is not None
    store._evict(0)
    assert store.lend(key(0)) is None
    assert torch.equal(BlockStore.take(loan), block(5))
    assert not loan.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "another", "no tensor file"])
def test_a_damaged_block_is_a_miss_counted_and_removed(store: BlockStore, damage: str) -> None:
    store.write(key(0), block(0))
    path = store._path(key(0))
    content = path.read_bytes()
    store.write(key(1), block(1))
    spoiled = {
        "truncated": content[:-8],
        "empty": b"",
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "another": store._path(key(1)).read_bytes(),
        "no tensor file": b"x" * 64,
    }
    path.write_bytes(spoiled[damage])
    assert store.read([key(0)]) == []
    assert store.counts["corrupt_blocks"] == 1
    assert not path.exists()
    assert store.write(key(0), block(0))
    assert len(store.read([key(0), key(1)])) == 2


def test_all_damaged_blocks_of_a_prompt_go_at_once(store: BlockStore) -> None:
    """A power loss leaves many empty files: one more prefill must be enough."""
    keys = [key(n) for n in range(5)]
    for number, name in enumerate(keys):
        store.write(name, block(number))
    for damaged in (keys[1], keys[3]):
        store._path(damaged).write_bytes(b"")
    assert len(store.read(keys)) == 1
    assert store.counts["corrupt_blocks"] == 2
    for number, name in enumerate(keys):
        store.write(name, block(number))
    assert len(store.read(keys)) == 5


def test_a_file_system_that_is_full_below_the_budget_loses_its_oldest_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlockStore(tmp_path, "ns", MIB)
    write = Path.write_bytes

    def on_a_small_disk(path: Path, content: bytes) -> int:
        if bytes_of(tmp_path) + len(content) > 4 * FILE:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", on_a_small_disk)
    for number in range(12):
        assert store.write(key(number), block(number)), number
        assert len(store.read([key(number)])) == 1
    assert not store.has(key(0))
    assert store.counts["evicted_blocks"] >= 8
    with pytest.raises(OSError, match="No space left"):
        store.write(key(99), block(99, size=8 * FILE))


def test_without_checksums_a_truncated_block_is_found_all_the_same(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "ns", MIB, checksums=False)
    store.write(key(0), block(0))
    path = store._path(key(0))
    path.write_bytes(path.read_bytes()[:-8])
    assert store.read([key(0)]) == []


def test_a_spoiled_byte_counter_is_made_anew(store: BlockStore) -> None:
    store.write(key(0), block(0))
    (store._root / ".bytes").write_text("12x")
    store.write(key(1), block(1))
    assert int((store._root / ".bytes").read_text()) == bytes_of(store._root)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VllmError, match="Choose another path"):
        BlockStore(tmp_path / "file" / "s", "ns", MIB)


def test_other_users_cannot_look_in(store: BlockStore) -> None:
    assert store._root.stat().st_mode & 0o077 == 0


def test_a_prefill_under_way_is_seen_until_it_ends(store: BlockStore) -> None:
    other = BlockStore(store._root, "ns", MIB)
    store.begin(key(0))
    assert other.pending(key(0))
    assert store.pending(key(0))
    other.end(key(0))
    assert store.pending(key(0)), "only its writer may end it"
    other.end(key(0), store.id)
    assert not store.pending(key(0))
    store.begin(key(0))
    other.begin(key(0))
    other.end(key(0))
    assert other.pending(key(0)), "another writer is still at it"
    store.end(key(0))
    assert not store.pending(key(0))


def _crash(root: Path, ready: str) -> None:
    store = BlockStore(root, "ns", MIB)
    store.write(key(0), block(0))
    store.begin(key(1))
    (root / "ns" / f"{store.id}-half.tmp").write_bytes(b"half a block")
    Path(ready).write_text(store.id)
    time.sleep(60)


def test_a_killed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    root, ready = tmp_path / "s", tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=_crash, args=(root, str(ready)))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.02)
    store = BlockStore(root, "ns", MIB)
    half = root / "ns" / f"{ready.read_text()}-half.tmp"
    assert store.pending(key(1))
    assert half.exists(), "it may still be writing"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not store.pending(key(1))
    again = BlockStore(root, "ns", MIB)
    assert not half.exists()
    assert list((root / "ns").glob("*.prefills")) == []
    assert len(again.read([key(0)])) == 1


def test_what_is_being_written_has_its_writers_name(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed here, it leaves nothing but what `_clean` knows as its own.
    folder = store._folder
    found: list[str] = []
    monkeypatch.setattr(
        block_store, "touch_file", lambda _: found.extend(path.name for path in folder.iterdir())
    )
    write = Path.write_bytes

    def listed(path: Path, content: bytes) -> int:
        written = write(path, content)
        found.extend(beside.name for beside in folder.iterdir())
        return written

    monkeypatch.setattr(Path, "write_bytes", listed)
    assert store.write(key(0), block(0))
    assert len(found) == 2
    assert all(name.startswith(store.id) and name.endswith(".tmp") for name in found)


def _churn(root: Path, seed: int, budget: int, faults: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    drawn = random.Random(seed)
    store = BlockStore(root, "ns", budget)
    try:
        for _ in range(150):
            number = drawn.randrange(40)
            if drawn.random() < 0.5:
                store.write(key(number), block(number))
            for at, found in enumerate(store.read([key(number), key(number + 1)])):
                if not torch.equal(found, block(number + at)):
                    faults.put(f"block {number + at} is another")
            used = bytes_of(root)
            if used > budget:
                faults.put(f"{used} bytes of {budget}")
    except Exception:
        faults.put(traceback.format_exc())
    if store.counts["corrupt_blocks"]:
        faults.put("a block was torn")
    faults.put("")


def test_many_processes_keep_blocks_whole_and_the_budget(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    faults = context.Queue()
    workers = [
        context.Process(target=_churn, args=(tmp_path / "s", seed, 12 * FILE, faults))
        for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    found = []
    while found.count("") < len(workers):
        found.append(faults.get(timeout=120))
    for worker in workers:
        worker.join()
    assert set(found) == {""}
    root = tmp_path / "s"
    assert int((root / ".bytes").read_text()) == bytes_of(root) > 0
