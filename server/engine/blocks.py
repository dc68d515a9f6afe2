"""KV blocks: who owns which, and which full ones can be shared. No tensors; a block is an index.

    owned (refs > 0) ──last free──▶ free, oldest first ──allocate──▶ owned
                                      └─ a cached one stays findable here until it is handed out again

Block 0 is the dummy: padding rows write to it, nobody ever owns it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

DUMMY_BLOCK = 0


class KvNamespace(msgspec.Struct, frozen=True):
    """All that decides a block's content apart from its tokens. Equal fields, equal KV.

    The fields are typed and named in the hashed form, so that no value of one (a salt that a client
    chose) can stand for a value of another (an adapter).
    """

    members: tuple[tuple[str, float], ...] = ()  # (image key, weight), in order; () = the base
    cache_salt: str = ""
    rope: str = ""  # the rotary variant, where a base has several

    @property
    def root(self) -> bytes:
        """Parent hash of every first block in this namespace."""
        return hashlib.sha256(b"kv namespace\0" + msgspec.msgpack.encode(self)).digest()


class BlockPool:
    """Hands out blocks 1 .. num_blocks - 1, counts their owners, and finds cached prefixes.

    A block enters the prefix cache under sha256(parent hash, its token ids), so equal hashes mean equal
    tokens from the first one on, in one namespace. All operations are O(blocks touched).
    """

    def __init__(self, num_blocks: int, block_size: int, *, has_prefix_cache: bool = True) -> None:
        assert num_blocks > 1 and block_size > 0, "a pool needs the dummy block and one more"
        self.num_blocks = num_blocks  # the dummy included
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        self.num_queried_tokens = 0  # totals since start; kept by record_match
        self.num_hit_tokens = 0
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to go first

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks without an owner, cached ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that have an owner, 0..1."""
        return 1.0 - self.num_free / self.num_usable

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    # --- ownership -----------------------------------------------------------------------------------------

    def can_allocate(self, count: int, reuse: Sequence[int] = ()) -> bool:
        """Whether `count` new blocks are left once the cached blocks `reuse` are taken too."""
        return self.num_free - sum(self._refs[block] == 0 for block in reuse) >= count

    def allocate(self, count: int, reuse: Sequence[int] = ()) -> list[int]:
        """One owner more for each block of `reuse`, then `count` new ones: the table reuse + new.

        The new ones are the longest unowned; what they had cached is forgotten. Ask can_allocate first.
        """
        assert self.can_allocate(count, reuse), f"{count} blocks asked for, {self.num_free} free"
        for block in reuse:
            self._refs[block] += 1
            self._free.pop(block, None)
        return [*reuse, *(self._take_oldest() for _ in range(count))]

    def free(self, blocks: Sequence[int]) -> None:
        """One owner less for each. Later blocks of a sequence go first when space is needed: without its
        parents a block can't be found."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed more often than taken"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._refs[block] = 1
        stale = self._hashes[block]
        if stale is not None:
            del self._cached[stale]
            self._hashes[block] = None
        return block

    # --- prefix cache --------------------------------------------------------------------------------------

    def extend_hashes(
        self, hashes: list[bytes], namespace: KvNamespace, token_ids: Sequence[int], num_tokens: int
    ) -> None:
        """Append to `hashes` those of the full blocks in token_ids[:num_tokens] that it doesn't have yet."""
        size = self.block_size
        first, last = len(hashes), num_tokens // size
        if not self.has_prefix_cache or first >= last:
            return
        parent = hashes[-1] if hashes else namespace.root
        data = array("q", token_ids[first * size : last * size]).tobytes()
        width = size * 8
        for start in range(0, len(data), width):
            parent = hashlib.sha256(parent + data[start : start + width]).digest()
            hashes.append(parent)

    def match_prefix(self, hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        """The blocks of the longest cached prefix of a request with these hashes and so many known tokens.

        Never all of its tokens: the last one must be computed to give logits. Takes nothing.
        """
        blocks: list[int] = []
        for block_hash in hashes[: (num_tokens - 1) // self.block_size]:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def record_match(self, num_queried: int, num_hit: int) -> None:
        """Count a request's tokens asked of the cache and found there, once, when it is admitted."""
        if self.has_prefix_cache:
            self.num_queried_tokens += num_queried
            self.num_hit_tokens += num_hit

    def cache(self, block: int, block_hash: bytes) -> None:
        """Make an owned, full, computed and collected block findable. The first of two equal ones stays."""
        assert self._refs[block] > 0, f"block {block} is cached without an owner"
        if block_hash not in self._cached and self._hashes[block] is None:
            self._cached[block_hash] = block
            self._hashes[block] = block_hash

    def check_integrity(self, owned: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that refs, free list and cache agree; with `owned`, all block tables, that nothing leaks."""
        assert self._refs[DUMMY_BLOCK] == 0 and DUMMY_BLOCK not in self._free, "the dummy block is in use"
        free = {block for block in range(1, self.num_blocks) if self._refs[block] == 0}
        assert set(self._free) == free, "free list and refs disagree"
        cached = {h: block for block, h in enumerate(self._hashes) if h is not None}
        assert self._cached == cached and DUMMY_BLOCK not in cached.values(), "the cache's two maps disagree"
        if owned is not None:
            counts = Counter(block for blocks in owned for block in blocks)
            refs = {block: count for block, count in enumerate(self._refs) if count}
            assert refs == counts, f"blocks owned {dict(counts)} but counted {refs}"
