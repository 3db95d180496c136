"""Who holds which block of the paged KV cache, and which full blocks may be shared.

A block is free (nothing of worth in it), used (in the table of ≥ 1 sequences) or cached (in no table, but its tokens
are known, so that a later sequence with the same prefix takes it as it is). Cached blocks are given out again, the
longest unused first, only when no free one is left.

A full, computed block is *sealed*: it gets a serial number that stands for the whole token prefix up to its end and
is never used twice. The index maps (serial of the prefix before it, the block's own tokens) to it. As a dict it finds
by hash and compares in full, so equal hashes of different tokens can never serve wrong KV.

A block that is being computed is *pending*. Whoever waits for it knows it by a hash of all tokens up to its end, and by
nothing else: equal hashes of different tokens make one wait for nothing, but not for long.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from moeray.engine.sequence import Sequence

_ROOT = 0  # the serial of the empty prefix

_Key = tuple[int, tuple[int, ...]]


class _Sealed(NamedTuple):
    serial: int
    block: int


class Pending(NamedTuple):
    """The next block that a sequence makes shareable: its place in the table, the hash of all tokens up to its end."""

    place: int
    prefix_hash: int


class BlockManager:
    """Accounts for `num_blocks` blocks of `block_size` tokens. It touches no KV: a block is a number."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[_Key, _Sealed] = {}
        self._keys: dict[int, _Key] = {}
        self._last_serial = _ROOT

    @property
    def available(self) -> int:
        """Blocks that can be given out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks in the table of at least one sequence."""
        return self.num_blocks - self.available

    def allocate(self, seq: Sequence, spare: int = 0) -> bool:
        """Give `seq`, which holds none, the blocks for all its tokens, those with a known prefix from the cache.

        Sets its `num_computed`; at least one token is always left to compute. False, with nothing changed, unless
        `spare` blocks remain available afterwards.
        """
        assert not seq.block_table, seq
        shared = self._match(seq, self._shareable(seq))
        fresh = self._blocks_for(seq.num_tokens) - len(shared)
        idle = sum(self._refs[sealed.block] == 0 for sealed in shared)
        if fresh + idle + spare > self.available:
            return False
        for sealed in shared:
            self._share(sealed.block)
        seq.block_table = [sealed.block for sealed in shared] + [self._take() for _ in range(fresh)]
        seq.prefix = [sealed.serial for sealed in shared]
        seq.num_computed = len(shared) * self.block_size
        return True

    def extend(self, seq: Sequence) -> bool:
        """Make the table cover all tokens of `seq`; False, with nothing changed, when too few blocks are available."""
        missing = self._blocks_for(seq.num_tokens) - len(seq.block_table)
        if missing > self.available:
            return False
        seq.block_table += [self._take() for _ in range(missing)]
        return True

    def seal(self, seq: Sequence) -> None:
        """Make the blocks of `seq` that are full and computed by now shareable."""
        if not self._prefix_cache:
            return
        for i in range(len(seq.prefix), seq.num_computed // self.block_size):
            key = self._key(seq, i)
            sealed = self._index.get(key)
            if sealed is None:
                # Where another sequence sealed the same tokens first, ours stays a private copy under the same serial.
                self._last_serial += 1
                sealed = self._index[key] = _Sealed(self._last_serial, seq.block_table[i])
                self._keys[sealed.block] = key
            seq.prefix.append(sealed.serial)

    def pending(self, seq: Sequence) -> Pending | None:
        """The next block that `seq`, which holds blocks, has to compute in full and nobody can share yet, if any."""
        if not self._prefix_cache:
            return None
        end = seq.num_tokens // self.block_size
        place = len(seq.prefix) + len(self._match(seq, end))
        return Pending(place, self._prefix_hash(seq, place)) if place < end else None

    def awaits(self, seq: Sequence, pending: Iterable[Pending]) -> bool:
        """Whether `seq`, which holds no blocks, would have to compute one of these itself if it got its blocks now, but
        can share it later."""
        end = self._shareable(seq)
        return any(place < end and self._prefix_hash(seq, place) == prefix_hash for place, prefix_hash in pending)

    def free(self, seq: Sequence, keep: bool = True) -> None:
        """Take all blocks from `seq`. `keep` False also forgets what is in them, so that nobody shares them again."""
        for block in reversed(seq.block_table):  # the end of a prefix is of use to fewer: it is to be evicted first
            if not keep:
                self._forget(block)
            self._refs[block] -= 1
            if self._refs[block] == 0 and block in self._keys:
                self._cached[block] = None
            elif self._refs[block] == 0:
                self._free.append(block)
        seq.block_table, seq.prefix, seq.num_computed = [], [], 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _key(self, seq: Sequence, i: int) -> _Key:
        parent = seq.prefix[i - 1] if i else _ROOT
        return parent, tuple(seq.tokens[i * self.block_size : (i + 1) * self.block_size])

    def _prefix_hash(self, seq: Sequence, place: int) -> int:
        """Of all tokens up to the end of a full block. Each block is hashed once: tokens are only ever appended."""
        hashes, size = seq.prefix_hashes, self.block_size
        for start in range(len(hashes) * size, (place + 1) * size, size):
            hashes.append(hash((hashes[-1] if hashes else _ROOT, tuple(seq.tokens[start : start + size]))))
        return hashes[place]

    def _shareable(self, seq: Sequence) -> int:
        """How many of its blocks it can take from others."""
        return seq.reusable // self.block_size

    def _match(self, seq: Sequence, end: int) -> list[_Sealed]:
        """The sealed blocks that hold its tokens behind those of its prefix, before place `end`."""
        found: list[_Sealed] = []
        size, parent = self.block_size, seq.prefix[-1] if seq.prefix else _ROOT
        for start in range(len(seq.prefix) * size, end * size, size):
            sealed = self._index.get((parent, tuple(seq.tokens[start : start + size])))
            if sealed is None:
                break
            found.append(sealed)
            parent = sealed.serial
        return found

    def _share(self, block: int) -> None:
        self._cached.pop(block, None)
        self._refs[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._index[key]

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert every invariant, given all sequences that hold blocks."""
        holders = list(sequences)
        counts = Counter(block for seq in holders for block in seq.block_table)
        used, free, cached = set(counts), set(self._free), set(self._cached)
        assert self._refs == [counts[block] for block in range(self.num_blocks)], "references differ from the tables"
        assert len(free) == len(self._free), "a block is free twice"
        in_two = used & free | used & cached | free & cached
        assert not in_two, "a block is in two states"
        assert len(used) + len(free) + len(cached) == self.num_blocks, "a block is lost"
        assert cached <= set(self._keys), "a cached block holds unknown tokens"
        assert not free & set(self._keys), "a free block is still shareable"
        assert {s.block: key for key, s in self._index.items()} == self._keys, "the index and its inverse differ"
        for seq in holders:
            self._check_table(seq, counts)

    def _check_table(self, seq: Sequence, counts: Counter[int]) -> None:
        assert len(set(seq.block_table)) == len(seq.block_table), f"a block is twice in one table: {seq}"
        assert seq.num_computed <= len(seq.block_table) * self.block_size, f"computed tokens have no block: {seq}"
        for i, block in enumerate(seq.block_table):
            if block in self._keys:
                assert self._keys[block] == self._key(seq, i), f"a shared block holds other tokens: {seq}"
            if i >= seq.num_computed // self.block_size:
                assert counts[block] == 1, f"a block being written is shared: {seq}"
                assert block not in self._keys, f"a block being written is sealed: {seq}"
