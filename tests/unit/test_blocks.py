"""The block pool: ownership, reuse order, and what a cached prefix may be."""

from __future__ import annotations

import pytest

from server.engine.blocks import BlockPool, KvNamespace

BASE = KvNamespace()


def hashes_of(pool: BlockPool, tokens: list[int], namespace: KvNamespace = BASE) -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, namespace, tokens, len(tokens))
    return hashes


def fill(pool: BlockPool, tokens: list[int], namespace: KvNamespace = BASE) -> list[int]:
    """Own blocks for `tokens`, and cache the full ones."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    for block, block_hash in zip(blocks, hashes_of(pool, tokens, namespace), strict=False):
        pool.cache(block, block_hash)
    return blocks


def match(pool: BlockPool, tokens: list[int], namespace: KvNamespace = BASE) -> list[int]:
    return pool.match_prefix(hashes_of(pool, tokens, namespace), len(tokens))


def test_the_dummy_block_is_never_handed_out():
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert not pool.can_allocate(1)
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 free"):
        pool.allocate(1)
    pool.check_integrity([[1, 2, 3, 4]])


def test_a_block_freed_too_often_is_an_error():
    pool = BlockPool(5, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(blocks)


def test_integrity_finds_a_leak():
    pool = BlockPool(5, 4)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="blocks owned"):
        pool.check_integrity([])


def test_a_prefix_is_found_up_to_the_first_difference():
    pool = BlockPool(17, 4)
    tokens = list(range(12))
    blocks = fill(pool, tokens)
    assert match(pool, [*tokens, 99]) == blocks
    assert match(pool, [*tokens[:8], 99, *tokens[9:], 99]) == blocks[:2]
    assert match(pool, [99, *tokens[1:], 99]) == []
    # the same block of tokens after another beginning is another block
    assert match(pool, [0, 1, 2, 3, 8, 9, 10, 11, 99]) == blocks[:1]


@pytest.mark.parametrize(("length", "found"), [(4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_the_last_token_is_always_left_to_compute(length, found):
    pool = BlockPool(17, 4)
    tokens = list(range(13))
    fill(pool, tokens)
    assert len(match(pool, tokens[:length])) == found


def test_only_full_blocks_have_hashes():
    pool = BlockPool(17, 4)
    assert [len(hashes_of(pool, list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_hashes_extended_piece_by_piece_are_the_same():
    pool = BlockPool(17, 4)
    tokens = list(range(23))
    hashes: list[bytes] = []
    for length in range(len(tokens) + 1):
        pool.extend_hashes(hashes, BASE, tokens, length)
    assert hashes == hashes_of(pool, tokens) and len(set(hashes)) == 5


NAMESPACES = [
    BASE,
    KvNamespace(members=(("a", 1.0),)),
    KvNamespace(members=(("b", 1.0),)),
    KvNamespace(members=(("a", 0.5),)),
    KvNamespace(members=(("a", 1.0), ("b", 1.0))),
    KvNamespace(members=(("b", 1.0), ("a", 1.0))),
    KvNamespace(cache_salt="a"),
    KvNamespace(cache_salt="b"),
    KvNamespace(members=(("a", 1.0),), cache_salt="b"),
    KvNamespace(members=(("b", 1.0),), cache_salt="a"),
    KvNamespace(rope="a"),
    KvNamespace(rope="long"),
    KvNamespace(members=(("ab", 1.0),)),
    KvNamespace(members=(("", 1.0),), cache_salt="ab"),
    KvNamespace(cache_salt="ab"),
]


def test_no_two_namespaces_share_a_block():
    assert len({namespace.root for namespace in NAMESPACES}) == len(NAMESPACES)
    pool = BlockPool(65, 4)
    tokens = list(range(9))
    owned = {namespace: fill(pool, tokens, namespace) for namespace in NAMESPACES}
    for namespace, blocks in owned.items():
        assert match(pool, tokens, namespace) == blocks[:2]


def test_a_freed_block_is_found_until_it_is_reused():
    pool = BlockPool(5, 4)
    tokens = list(range(9))
    blocks = fill(pool, tokens)
    pool.free(blocks)
    assert pool.num_free == 4 and match(pool, tokens) == blocks[:2]
    taken = pool.allocate(0, reuse=match(pool, tokens))
    assert taken == blocks[:2] and pool.num_free == 2
    pool.free(taken)
    pool.allocate(4)
    assert match(pool, tokens) == []


def test_uncached_blocks_go_before_cached_ones_and_tails_before_heads():
    pool = BlockPool(7, 4)
    older, newer = fill(pool, [1] * 8), fill(pool, [2] * 9)  # the last of newer's three is not full
    pool.free(older)
    pool.free(newer)
    order = [pool.allocate(1)[0] for _ in range(6)]
    assert set(order[:2]) == {newer[2], 6}, "what holds nothing goes first"
    assert order[2:] == [older[1], older[0], newer[1], newer[0]]


def test_use_makes_a_block_young_again():
    pool = BlockPool(5, 4)
    first, second = fill(pool, [1] * 4), fill(pool, [2] * 4)
    pool.free(first)
    pool.free(second)
    pool.free(pool.allocate(0, reuse=first))
    pool.allocate(3)
    assert match(pool, [1] * 5) == first and match(pool, [2] * 5) == []


def test_shared_blocks_are_free_when_the_last_owner_is_gone():
    pool = BlockPool(5, 4)
    blocks = fill(pool, [1] * 8)
    table = pool.allocate(1, reuse=blocks)
    pool.check_integrity([blocks, table])
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(table)
    assert pool.num_free == 4 and pool.usage == 0.0
    pool.check_integrity([])


def test_room_counts_the_cached_blocks_that_would_be_taken():
    pool = BlockPool(5, 4)
    blocks = fill(pool, [1] * 8)
    assert pool.can_allocate(2, reuse=blocks)  # they have an owner already
    pool.free(blocks)
    assert pool.can_allocate(2, reuse=blocks) and not pool.can_allocate(3, reuse=blocks)


def test_the_first_of_two_equal_blocks_stays_in_the_cache():
    pool = BlockPool(5, 4)
    first, second = fill(pool, [1] * 4), fill(pool, [1] * 4)
    assert match(pool, [1] * 5) == first
    pool.free(second)
    pool.check_integrity([first])
    assert pool.allocate(1) == second, "the copy holds nothing worth keeping"


def test_only_owned_blocks_are_cached():
    pool = BlockPool(5, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="without an owner"):
        pool.cache(blocks[0], hashes_of(pool, [1] * 4)[0])


def test_counters():
    pool = BlockPool(5, 4)
    pool.record_match(10, 8)
    pool.record_match(5, 0)
    assert (pool.num_queried_tokens, pool.num_hit_tokens) == (15, 8)


def test_without_a_prefix_cache_nothing_is_hashed_or_counted():
    pool = BlockPool(5, 4, has_prefix_cache=False)
    assert hashes_of(pool, list(range(9))) == []
    pool.record_match(10, 0)
    assert pool.num_queried_tokens == 0
