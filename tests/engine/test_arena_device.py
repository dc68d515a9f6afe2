"""The arena of a device: what is written when, checked on a stand-in that knows what comes before what."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.host import HostCache
from adapters_store.ref import AdapterRef
from server.adapters import memory
from server.adapters.memory import DeviceMemory, absent_rows
from server.adapters.pinned import PinnedPool
from server.adapters.regions import ALIGNMENT
from server.adapters.slots import Acquire
from server.adapters.streams import CudaStreams
from tests.engine.test_arena import ABSENT, DTYPES, Rig, compile_image, damage, make_manifest
from tests.streams import RecordedStreams, Work, extent


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch):
    """Images of some 30 KB pass through staging in several parts, and moves through scratch in several pieces."""
    monkeypatch.setattr(memory, "STAGING_BYTES", 5000)
    monkeypatch.setattr(memory, "SCRATCH_BYTES", 3000)


class DeviceRig(Rig):
    """A Rig whose arena believes in streams; steps are dispatched here and collected when the test says so."""

    def __init__(self, folder: Path, host: str = "straight", host_bytes: int = 0, **options):
        self.streams = RecordedStreams()
        super().__init__(folder, streams=self.streams, host=host_tier(host, self.streams, host_bytes), **options)

    def step(self, *slots: int) -> Work:
        """Dispatch a step that reads these slots: it must find their images whole, at the time when it runs."""
        weights, held = self.arena.weights, {slot: (ref, offset) for slot, ref, offset in self.slots.residents()}
        raw = weights.arena.view(torch.uint8)
        images = {slot: raw[held[slot][1] : held[slot][1] + held[slot][0].data_bytes] for slot in slots}
        reads = [extent(weights.table[slot]) for slot in slots] + [extent(image) for image in images.values()]

        def run() -> None:
            for slot in slots:
                self.check_tensors(slot, held[slot][0])

        return self.streams.step(reads, run)

    def check_tensors(self, slot: int, ref: AdapterRef) -> None:
        """What the host knows of ranks is ahead of the device while uploads wait."""
        self.arena.weights.slot_ranks[slot] = int(self.arena.weights.table[slot, :, 3].max())
        super().check_tensors(slot, ref)

    def check(self) -> None:
        self.streams.drain()
        super().check()


def host_tier(kind: str, streams: RecordedStreams, num_bytes: int) -> HostCache | None:
    if kind == "straight":
        return None
    return HostCache(num_bytes, *([PinnedPool(streams.pinned(num_bytes)).allocate] if kind == "pinned" else []))


@pytest.mark.parametrize("host", ["straight", "pageable", "pinned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_where_the_table_says(tmp_path, dtype, host):
    rig = DeviceRig(tmp_path, dtype=dtype, host=host, host_bytes=1 << 20)
    for seed in range(1, 6):
        rig.hold(rig.image(seed))
    rig.check()
    assert rig.slots.resident == 5
    num_copies = rig.streams.given.count("load")
    assert num_copies == 5 if host == "pinned" else num_copies > 15, "in one piece, or in parts of the buffers' size"


def test_ranks_are_known_on_the_host(tmp_path):
    rig = DeviceRig(tmp_path)
    ref = rig.image(3)
    slot = rig.hold(ref)
    assert rig.arena.weights.slot_ranks[slot] == ref.max_rank > 0
    rig.slots.release(slot)
    rig.slots.drop(ref.image_key)
    assert rig.arena.weights.slot_ranks[slot] == 0


def test_a_copy_into_freed_memory_waits_for_the_step_that_read_it(tmp_path):
    """The step is in flight when its slot is cleared and its region loaded into."""
    rig = DeviceRig(tmp_path)
    first, second = rig.image(1), rig.image(2)
    slot = rig.hold(first)
    offset = next(offset for _, _, offset in rig.slots.residents())
    step = rig.step(slot)
    rig.arena.clear(slot)
    rig.arena.load(second, slot, offset).result(20)
    assert step.is_done, "the region was overwritten before the step had read it"
    rig.streams.drain()


def test_a_load_waits_for_the_move_that_made_its_room(tmp_path):
    """A newcomer's region is where an idle image was moved away from, on the device, a moment before."""
    pages = [-(-compile_image(tmp_path, make_manifest(), seed).data_bytes // ALIGNMENT) for seed in range(1, 5)]
    rig = DeviceRig(tmp_path, arena_bytes=sum(pages) * ALIGNMENT)
    refs = [rig.image(seed) for seed in range(1, 5)]
    slots = [rig.hold(ref) for ref in refs]
    step = rig.step(*slots)  # still in flight: nothing but the fence keeps the newcomer behind it
    for slot in slots:
        rig.slots.release(slot)
    rig.slots.drop(refs[0].image_key)
    rig.slots.drop(refs[2].image_key)
    least, most = max(pages[0], pages[2]), pages[0] + pages[2]
    rig.hold(next(ref for ref in map(rig.image, range(5, 60)) if least < -(-ref.data_bytes // ALIGNMENT) <= most))
    assert step.is_done and rig.slots.moved_bytes > 0 and rig.slots.evictions == 0
    rig.check()


def test_an_image_is_ready_when_its_copy_has_ended(tmp_path):
    rig = DeviceRig(tmp_path)
    ref = rig.image(1)
    rig.streams.gate.clear()
    assert rig.slots.acquire(ref)[0] is Acquire.LOADING
    deadline = time.monotonic() + 20
    while "load" not in rig.streams.given:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    assert rig.slots.poll() == [] and rig.slots.acquire(ref)[0] is Acquire.LOADING
    assert rig.streams.given.count("upload") == 0, "its table rows came before its bytes"
    rig.streams.gate.set()
    rig.hold(ref)
    rig.check()


def test_a_step_sees_the_rows_of_its_own_time(tmp_path):
    """Rows written between two steps are seen by the second alone, whole, although both run later."""
    rig = DeviceRig(tmp_path)
    slot = rig.hold(rig.image(1))
    table, seen = rig.arena.weights.table, []
    extents = [extent(table[slot])]
    rig.streams.step(extents, lambda: seen.append(table[slot].clone()))
    rig.arena.clear(slot)
    rig.streams.step(extents, lambda: seen.append(table[slot].clone()))
    rig.streams.drain()
    before, after = seen
    assert (before[:, 3] > 0).any() and (after == torch.tensor(ABSENT)).all()


@pytest.mark.parametrize("damaged", ["sum", "end"])
def test_a_load_that_fails_leaves_no_copy_behind(tmp_path, monkeypatch, damaged):
    """Its region is free as soon as the failure is told: what is loaded there next is whole."""
    rig = DeviceRig(tmp_path)
    bad, good = rig.image(1), rig.image(2)
    if damaged == "sum":
        damage(bad.image_path, bad.data_offset + bad.data_bytes - 1)
    with monkeypatch.context() as patch:
        if damaged == "end":  # the file shrinks while it is read
            preadv = os.preadv
            patch.setattr(
                os, "preadv", lambda file, views, at: preadv(file, views, at) * (at < bad.data_offset + 10000)
            )
        assert isinstance(rig.arena.load(bad, 1, 0).exception(20), AdapterCorrupt)
    assert "load" in rig.streams.given and all(work.is_done for work in rig.streams._open if work.name == "load")
    Path(bad.image_path).unlink()
    assert isinstance(rig.arena.load(bad, 1, 0).exception(20), AdapterUnavailable)
    rig.hold(good)
    rig.check()


@pytest.mark.parametrize("host", ["straight", "pageable", "pinned"])
def test_random_loads_moves_and_evictions_between_steps_in_flight(tmp_path, host):
    """Two steps in flight; a ref goes when the last step that used it was collected, as the scheduler has it."""
    rng = random.Random(11)
    rig = DeviceRig(tmp_path, arena_bytes=64 * 1024, host=host, host_bytes=64 * 1024)
    refs = [rig.image(seed) for seed in range(1, 13)]
    held: list[int] = []
    ending: list[tuple[int, int]] = []  # (slot, the step after which it goes)
    in_flight: list[Work] = []
    for number in range(500):
        if rng.random() < 0.5 and len(held) < 4:
            outcome, slot = rig.slots.acquire(rng.choice(refs))
            if outcome is Acquire.READY:
                held.append(slot)
        elif held and rng.random() < 0.6:
            ending.append((held.pop(rng.randrange(len(held))), number))
        else:
            rig.slots.prefetch(rng.choice(refs))
        in_flight.append(rig.step(*{*held, *(slot for slot, _ in ending)}))
        if len(in_flight) == 2:
            rig.streams.wait(in_flight.pop(0))
            for slot, last in [entry for entry in ending if entry[1] < number]:
                ending.remove((slot, last))
                rig.slots.release(slot)
        assert rig.slots.poll() == []
        if number % 10 == 0:  # loads go on beside the other steps, and end however busy the machine is
            assert rig.wait() == []
    rig.wait()
    rig.check()
    assert rig.slots.loads > 20 and rig.slots.evictions > 5 and not rig.streams.races


def test_the_pools_buffers(tmp_path):
    """Distinct ranges, free when let go of and not before; plain memory when there is no room."""
    streams = RecordedStreams()
    pool = PinnedPool(streams.pinned(8 * ALIGNMENT))
    first, second = pool.allocate(3 * ALIGNMENT - 5), pool.allocate(5 * ALIGNMENT)
    first[:], second[:] = 1, 2
    assert len(first) == 3 * ALIGNMENT - 5 and first.max() == 1
    assert all(streams.is_pinned(torch.from_numpy(buffer)) for buffer in (first, second))
    view = memoryview(first)
    del first
    third = pool.allocate(ALIGNMENT)
    assert not streams.is_pinned(torch.from_numpy(third)) and view[0] == 1, "it is still referred to"
    del view
    fourth = pool.allocate(2 * ALIGNMENT)
    assert streams.is_pinned(torch.from_numpy(fourth)) and second.min() == 2


@pytest.mark.parametrize("seed", range(8))
def test_moves_onto_themselves(seed):
    rng = np.random.default_rng(seed)
    streams = RecordedStreams()
    table = np.tile(absent_rows(3), (2, 1, 1))
    arena = DeviceMemory(16 * ALIGNMENT, table, torch.uint8, torch.device("cpu"), streams)
    content = rng.integers(0, 256, 16 * ALIGNMENT, dtype=np.uint8)
    arena.weights.arena.copy_(torch.from_numpy(content))
    for _ in range(6):
        old, new = (int(page) * ALIGNMENT for page in rng.integers(0, 8, 2))
        num_bytes = int(rng.integers(1, 8 * ALIGNMENT))
        arena.move(old, new, num_bytes)
        content[new : new + num_bytes] = content[old : old + num_bytes].copy()
    streams.drain()
    assert np.array_equal(arena.weights.arena.numpy(), content)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where torch sees an NVIDIA GPU")
@pytest.mark.parametrize("host", ["straight", "pageable", "pinned"])
def test_on_a_gpu(tmp_path, host):
    """Real streams under a device kept busy: bytes, table and moves, after random comings and goings."""
    rng = random.Random(3)
    tier = host_tier(host, CudaStreams(torch.device("cuda")), 64 * 1024)
    rig = Rig(tmp_path, arena_bytes=64 * 1024, host=tier, device="cuda")
    refs = [rig.image(seed) for seed in range(1, 13)]
    work = torch.randn(2048, 2048, device="cuda")
    for _ in range(300):
        for _ in range(5):
            work = torch.tanh(work @ work)
        ref = rng.choice(refs)
        slot = rig.hold(ref)
        rig.check_tensors(slot, ref)
        rig.slots.release(slot)
        if rng.random() < 0.2:
            rig.slots.drop(rng.choice(refs).image_key)
    rig.check()
    assert rig.slots.loads > 20 and rig.slots.evictions > 5
