"""Random operations on the block pool against a model that keeps whole token prefixes."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.blocks import BlockPool, KvNamespace

NUM_BLOCKS, SIZE = 12, 2
NAMESPACES = [KvNamespace(), KvNamespace(members=(("x", 1.0),)), KvNamespace(cache_salt="x")]
Content = tuple[int, tuple[int, ...]]  # namespace index, all tokens up to the block's end


class BlocksMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.owned: list[list[int]] = []
        self.content: dict[int, Content] = {}  # what was last written to a block and cached

    @rule(namespace=st.integers(0, 2), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def take(self, namespace: int, tokens: list[int]) -> None:
        """Admit a sequence, compute it all, and cache its full blocks."""
        hashes: list[bytes] = []
        self.pool.extend_hashes(hashes, NAMESPACES[namespace], tokens, len(tokens))
        prefix = self.pool.match_prefix(hashes, len(tokens))
        assert len(prefix) * SIZE < len(tokens)
        for index, block in enumerate(prefix):
            assert self.content[block] == (namespace, tuple(tokens[: (index + 1) * SIZE]))
        missing = self.pool.blocks_for(len(tokens)) - len(prefix)
        free_after = NUM_BLOCKS - 1 - len({b for blocks in self.owned for b in blocks} | set(prefix))
        assert self.pool.can_allocate(missing, prefix) == (missing <= free_after)
        if missing > free_after:
            return
        blocks = self.pool.allocate(missing, reuse=prefix)
        assert blocks[: len(prefix)] == prefix and 0 not in blocks
        assert not set(blocks[len(prefix) :]) & {b for other in self.owned for b in other}
        for block in blocks[len(prefix) :]:
            self.content.pop(block, None)
        for index in range(len(prefix), len(hashes)):
            self.pool.cache(blocks[index], hashes[index])
            self.content[blocks[index]] = (namespace, tuple(tokens[: (index + 1) * SIZE]))
        self.owned.append(blocks)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.owned)
        owners = Counter(block for blocks in self.owned for block in blocks)
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(owners)

    def teardown(self) -> None:
        for blocks in self.owned:
            self.pool.free(blocks)
        self.pool.check_integrity([])
        assert self.pool.num_free == NUM_BLOCKS - 1


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
