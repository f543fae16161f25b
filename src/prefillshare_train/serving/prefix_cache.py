"""Finding prompt blocks again: content addresses, longest common prefixes, the host tier.

A block's key is a hash over its parent's key and its own token ids, so it names the whole prompt up
to its end. The chain starts from a root that names the base's weights, the K/V dtype and the
tenant: two bases, or two tenants who ask for isolation, never share a block. Only the base's K/V
are ever put in here.

A prompt's last block may be partly filled. It is kept like the others, and a prompt that goes on
from anywhere inside a kept block copies the tokens they share, so nothing is run twice.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prefillshare_train.serving.block_pool import BlockPool, NoBlocksError
from prefillshare_train.serving.kv_storage import KVStorage

Key = bytes


def root_key(
    base_fingerprint: str, kv_dtype: str, cache_salt: str | None, owner: str | None = None
) -> Key:
    """The key that all blocks of one base, dtype, tenant and owner descend from.

    Args:
        owner: a decoder that shares with no other (the isolated baseline).
    """
    parts = [base_fingerprint, kv_dtype, cache_salt, owner]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def block_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Key of a block that follows `parent`."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


@dataclass(eq=False)
class Entry:
    """A kept block: in the pool (`block`), or in the host tier (`staged`)."""

    key: Key
    parent: Key
    tokens: tuple[int, ...]
    block: int | None
    staged: Tensor | None = None


@dataclass(frozen=True)
class Match:
    """What is kept of a prompt.

    Attributes:
        full: entries of its leading whole blocks.
        tail: an entry that begins as the prompt goes on, or None.
        tail_tokens: how many tokens of it are the prompt's.
        parent: key of the last whole block (the root where there is none).
        tokens: prompt tokens found in all.
    """

    full: tuple[Entry, ...]
    tail: Entry | None
    tail_tokens: int
    parent: Key
    tokens: int

    def without_tail(self) -> Match:
        """The whole blocks alone."""
        return Match(self.full, None, 0, self.parent, self.tokens - self.tail_tokens)


@dataclass
class PrefixCache:
    """The kept blocks of one pool.

    Args:
        storage: the memory behind the blocks.
        blocks: block numbers of the pool.
        staging_bytes: byte budget of the host tier; 0 for none.

    Attributes:
        pool: reference counts; blocks that are given up move to the host tier.
        staged_out_bytes, staged_in_bytes: moved to and from the host tier so far.
    """

    storage: KVStorage
    blocks: Sequence[int]
    staging_bytes: int = 0
    staged_out_bytes: int = 0
    staged_in_bytes: int = 0
    _by_key: dict[Key, Entry] = field(default_factory=dict)
    _by_block: dict[int, Entry] = field(default_factory=dict)
    _children: dict[Key, dict[int, list[Entry]]] = field(default_factory=dict)
    _staged: OrderedDict[Key, Entry] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks, self._stage_or_drop)

    @property
    def staged_blocks(self) -> int:
        """Blocks in the host tier."""
        return len(self._staged)

    def match(self, root: Key, tokens: Sequence[int]) -> Match:
        """Find what is kept of a prompt; changes nothing."""
        size = self.storage.block_tokens
        full: list[Entry] = []
        parent = root
        for start in range(0, len(tokens) - size + 1, size):
            entry = self._by_key.get(block_key(parent, tokens[start : start + size]))
            if entry is None:
                break
            full.append(entry)
            parent = entry.key
        done = len(full) * size
        tail, shared = self._longest_child(parent, tokens[done : done + size])
        return Match(tuple(full), tail, shared, parent, done + shared)

    def _longest_child(self, parent: Key, rest: Sequence[int]) -> tuple[Entry | None, int]:
        best: Entry | None = None
        longest = 0
        if rest:
            for entry in self._children.get(parent, {}).get(rest[0], ()):
                shared = common_prefix(entry.tokens, rest)
                if shared > longest:
                    best, longest = entry, shared
        return best, longest

    def missing_blocks(self, match: Match, tokens: int) -> int:
        """What holding a prompt takes out of `pool.available`.

        Args:
            tokens: prompt tokens that the base supplies.

        Returns:
            Blocks to be allocated, and unreferenced ones that would become held: shared ones for
            as long as the prompt is, and the one that a tail is copied from meanwhile.
        """
        size = self.storage.block_tokens
        shared = [e for e in match.full if e.block is not None]
        new = -(-tokens // size) - len(shared)
        touched = list(shared)
        if match.tail is not None and match.tail.block is not None:
            touched.append(match.tail)
            new -= self._is_whole_tail(match, tokens)
        return new + sum(not self.pool.is_held(e.block) for e in touched if e.block is not None)

    @staticmethod
    def _is_whole_tail(match: Match, tokens: int) -> bool:
        return match.tail is not None and match.tokens == tokens

    def acquire(self, match: Match, tokens: int, extra: int) -> tuple[list[int], list[int]]:
        """Hold a prompt's blocks, kept or to be filled, and `extra` private ones.

        Args:
            match: of this prompt, made just now.
            tokens: prompt tokens that the base supplies.

        Returns:
            Blocks for the prompt, of which the first `match.tokens` tokens are in place, and the
            private ones.

        Raises:
            NoBlocksError: too few are free; nothing was taken.
        """
        kept = list(match.full)
        if self._is_whole_tail(match, tokens) and match.tail is not None:
            kept.append(match.tail)
        # Held before anything is allocated, so that allocating cannot evict them.
        guarded = [e.block for e in kept if e.block is not None]
        copied = match.tail if match.tail not in kept else None
        if copied is not None and copied.block is not None:
            guarded.append(copied.block)
        staged = {e.key: e.staged for e in (*kept, *([copied] if copied else []))}
        for block in guarded:
            self.pool.share(block)
        held = -(-tokens // self.storage.block_tokens)
        resident = sum(e.block is not None for e in kept)
        try:
            fresh = self.pool.allocate(held - resident + extra)
        except NoBlocksError:
            self.pool.release(guarded)
            raise
        private, fresh = fresh[:extra], fresh[extra:]
        # A masked value still meets a weight of zero, and zero times NaN is NaN: what may be read
        # before it is written must be finite.
        self.storage.clear([*private, *fresh[-1:]])
        blocks: list[int] = []
        for entry in kept:
            if entry.block is None:
                content = staged[entry.key]
                assert content is not None
                self._bring_back(entry, fresh.pop(0), content)
            assert entry.block is not None
            blocks.append(entry.block)
        if copied is not None:
            target = fresh.pop(0)
            if copied.block is not None:
                self.storage.copy_tokens(copied.block, target, match.tail_tokens)
                self.pool.release([copied.block])
            else:
                content = staged[copied.key]
                assert content is not None
                self.storage.put_back(target, content)
                self.staged_in_bytes += self.storage.block_bytes
            blocks.append(target)
        return [*blocks, *fresh], private

    def commit(self, parent: Key, tokens: Sequence[int], block: int) -> Key:
        """Make a block that the base has filled findable.

        Where the same tokens are kept already, those stay and this block remains private.

        Returns:
            The block's key, which is the parent of what follows it.
        """
        key = block_key(parent, tokens)
        known = self._by_key.get(key)
        if known is not None and known.block is not None:
            return key
        if known is not None:
            self._forget_staged(known)
        entry = Entry(key, parent, tuple(tokens), block)
        self._by_key[key] = entry
        self._by_block[block] = entry
        self._children.setdefault(parent, {}).setdefault(entry.tokens[0], []).append(entry)
        self.pool.set_findable(block)
        return key

    def drop_all(self) -> None:
        """Forget every kept block; those that are held stay held."""
        for block in list(self._by_block):
            self.pool.forget(block)
        for table in (self._by_key, self._by_block, self._children, self._staged):
            table.clear()

    def _stage_or_drop(self, block: int) -> None:
        entry = self._by_block.pop(block)
        entry.block = None
        size = self.storage.block_bytes
        if self.staging_bytes < size:
            self._unlist(entry)
            return
        while (len(self._staged) + 1) * size > self.staging_bytes:
            _, oldest = self._staged.popitem(last=False)
            oldest.staged = None
            self._unlist(oldest)
        entry.staged = self.storage.take_out(block)
        self._staged[entry.key] = entry
        self.staged_out_bytes += size

    def _bring_back(self, entry: Entry, block: int, content: Tensor) -> None:
        self.storage.put_back(block, content)
        self.staged_in_bytes += self.storage.block_bytes
        if self._by_key.get(entry.key) is not entry:
            # Allocating pushed it out of the host tier: list it anew.
            self._by_key[entry.key] = entry
            siblings = self._children.setdefault(entry.parent, {})
            siblings.setdefault(entry.tokens[0], []).append(entry)
        self._staged.pop(entry.key, None)
        entry.staged, entry.block = None, block
        self._by_block[block] = entry
        self.pool.set_findable(block)

    def _forget_staged(self, entry: Entry) -> None:
        self._staged.pop(entry.key, None)
        entry.staged = None
        self._unlist(entry)

    def _unlist(self, entry: Entry) -> None:
        del self._by_key[entry.key]
        siblings = self._children[entry.parent]
        alike = siblings[entry.tokens[0]]
        alike.remove(entry)
        if not alike:
            del siblings[entry.tokens[0]]
        if not siblings:
            del self._children[entry.parent]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
