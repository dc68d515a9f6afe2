"""Each guard broken once: the isolation storm must go red, or it would not have seen the fault it is there for."""

from __future__ import annotations

import hashlib

import pytest

from adapters_store.ref import SourceVersion
from adapters_store.store import AdapterStore
from kernels.types import Segments
from server.adapters.slots import AdapterSlots
from server.engine.batch import BatchBuilder
from server.engine.blocks import BlockPool, KvNamespace
from server.model import runner
from tests.e2e.test_isolation import tiny, tiny_world  # noqa: F401 (a fixture)

MAX_REQUESTS = 2000


def namespace_without_adapter(patch):
    """KV found by tokens alone, whoever computed it."""
    patch.setattr(KvNamespace, "root", property(lambda _: b"one for all"))


def block_hash_without_parent(patch):
    """A block found by its own tokens, whatever stands before it."""

    def extend_hashes(pool, hashes, namespace, token_ids, num_tokens):
        size = pool.block_size
        for index in range(len(hashes), num_tokens // size):
            own = repr(token_ids[index * size : (index + 1) * size]).encode()
            hashes.append(hashlib.sha256(namespace.root + own).digest())

    patch.setattr(BlockPool, "extend_hashes", extend_hashes)


def reused_block_stays_findable(patch):
    """The prefix cache keeps pointing to a block that was handed to another request."""
    take = BlockPool._take_oldest

    def take_and_keep(pool):
        block = next(iter(pool._free))
        stale = pool._hashes[block]
        taken = take(pool)
        if stale is not None:
            pool._cached[stale] = taken
        return taken

    patch.setattr(BlockPool, "_take_oldest", take_and_keep)


def block_leaks(patch):
    """A request that ends keeps its last block."""
    free = BlockPool.free
    patch.setattr(BlockPool, "free", lambda pool, owned: free(pool, owned[:-1]))


def slot_in_use_is_evictable(patch):
    """Taking a ref does not protect the image."""
    patch.setattr(AdapterSlots, "_leave_idle", lambda *_: None)


def slot_released_twice(patch):
    """A ref is dropped while a request still runs on it."""
    acquire = AdapterSlots.acquire

    def acquire_and_drop(slots, ref):
        answer, slot = acquire(slots, ref)
        if slot:
            slots.release(slot)
        return answer, slot

    patch.setattr(AdapterSlots, "acquire", acquire_and_drop)


def rows_of_two_slots_swapped(patch):
    """The segment plan gives the first two adapters of a step each other's rows."""
    planned = runner.segments_of

    def swapped(*arguments):
        def swap(segments: Segments) -> Segments:
            if len(segments.members) > 1:
                segments.members[:2] = reversed(segments.members[:2])
            return segments

        body, head = planned(*arguments)
        return swap(body), swap(head)

    patch.setattr(runner, "segments_of", swapped)


def batch_with_a_stale_slot(patch):
    """A row carries the slot of its neighbour."""
    build = BatchBuilder.build

    def build_rotated(builder, plan):
        batch = build(builder, plan)
        batch.row_slots[:] = [*batch.row_slots[1:], *batch.row_slots[:1]]
        return batch

    patch.setattr(BatchBuilder, "build", build_rotated)


def version_kept_after_replacement(patch):
    """What a name pointed to first is what it points to for ever."""
    resolve = AdapterStore.resolve
    first: dict[str, SourceVersion] = {}

    async def resolve_once(store, name):
        now = await resolve(store, name)  # a removed name is still not found
        return first.setdefault(name, now)

    patch.setattr(AdapterStore, "resolve", resolve_once)


GUARDS = [
    namespace_without_adapter,
    block_hash_without_parent,
    reused_block_stays_findable,
    block_leaks,
    slot_in_use_is_evictable,
    slot_released_twice,
    rows_of_two_slots_swapped,
    batch_with_a_stale_slot,
    version_kept_after_replacement,
]


@pytest.mark.parametrize("break_guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_storm_sees_a_broken_guard(tiny, tmp_path, monkeypatch, break_guard):  # noqa: F811
    world = tiny_world(tiny, tmp_path, seed=4)
    try:
        with monkeypatch.context() as patch:
            break_guard(patch)
            seen = what_the_storm_sees(world)
        print(f"{break_guard.__name__}: {seen[:120]}")
        assert seen, "the storm stayed green"
    finally:
        world.close()


def what_the_storm_sees(world) -> str:
    """A wrong answer, or the invariant that stopped the run; empty when all was well."""
    try:
        for num_requests in range(200, MAX_REQUESTS + 1, 200):
            counts = world.run(num_requests, max_open=32)
            if counts.wrong:
                return f"{counts.wrong} wrong answers of {num_requests}"
        world.driver.assert_nothing_leaked()
    except (AssertionError, RuntimeError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""
