"""Random operations on the slots over a device that holds real bytes; invariants after each."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters_store.errors import AdapterCorrupt, AdapterTooLarge
from adapters_store.ref import AdapterRef
from server.adapters.regions import region_bytes
from server.adapters.slots import Acquire, AdapterSlots
from tests.unit.byte_device import PAGE, ByteDevice, make_ref

ARENA = 16 * PAGE
MAX_SLOTS = 7
SOFT_PIN_S = 5.0
SIZES = [1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE, 3 * PAGE, 3 * PAGE, 4 * PAGE - 1, 5 * PAGE, 7 * PAGE, 16 * PAGE]
REFS = [make_ref(f"k{i}", size) for i, size in enumerate(SIZES)]
TOO_LARGE = make_ref("huge", ARENA + 1)

refs = st.sampled_from(REFS)


class SlotsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.device = ByteDevice(bytearray(ARENA + 3 * PAGE))  # a tail that nothing may ever touch
        self.slots = AdapterSlots(
            arena_bytes=ARENA + 17,
            max_slots=MAX_SLOTS,
            device=self.device,
            clock=lambda: self.now,
            soft_pin_s=SOFT_PIN_S,
        )
        self.held: list[tuple[AdapterRef, int, int]] = []  # (ref, slot, offset when acquired): one per ref taken
        self.pins: dict[str, float] = {}  # at most: what may still be softly pinned, until when
        self.sure_pins: dict[str, float] = {}  # at least: just loaded, and nobody has come for it yet
        self.dropped: set[str] = set()  # in use or loading when dropped

    # --- rules -------------------------------------------------------------------------------------------

    @rule(ref=refs, name=st.sampled_from(["a", "b"]))
    def acquire(self, ref: AdapterRef, name: str) -> None:
        ref = make_ref(ref.image_key, ref.data_bytes, name)  # another name of the same content
        was_ready = self._ready_slot(ref.image_key)
        num_clears, num_moves = len(self.device.clears), self.device.moves
        outcome, slot = self.slots.acquire(ref)
        self._assert_no_pinned_left(num_clears)
        if outcome is Acquire.READY:
            assert slot == was_ready and slot > 0
            self.device.in_use[slot] += 1
            self.held.append((ref, slot, self.device.table[slot][1]))
            self.pins.pop(ref.image_key, None)
            self.sure_pins.pop(ref.image_key, None)
        else:
            assert slot == 0 and was_ready is None
            is_loading = any(load.ref.image_key == ref.image_key for load in self._loads())
            assert is_loading == (outcome is Acquire.LOADING)
        if outcome is Acquire.FULL:
            self._assert_no_room(ref)
            assert (len(self.device.clears), self.device.moves) == (num_clears, num_moves), "disturbed for nothing"

    @rule(ref=refs)
    def hold(self, ref: AdapterRef) -> None:
        """What a request with patience does: ask, wait for the load, take it."""
        self.acquire(ref, "a")
        if self._ready_slot(ref.image_key) is None:
            while self.device.pending:
                self.device.finish(0)
            self.poll()
            self.acquire(ref, "a")

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ref, slot, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.device.in_use[slot] -= 1
        self.slots.release(slot)
        if not self.device.in_use[slot] and ref.image_key in self.dropped:
            self.dropped.remove(ref.image_key)
            assert slot not in self.device.table, "a dropped image outlives its last ref"

    @rule(ref=refs)
    def prefetch(self, ref: AdapterRef) -> None:
        num_clears = len(self.device.clears)
        self.slots.prefetch(ref)
        self._assert_no_pinned_left(num_clears)
        if self._ready_slot(ref.image_key) is not None:
            self.pins[ref.image_key] = self.now + SOFT_PIN_S

    @precondition(lambda self: self.device.pending)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def finish(self, data: st.DataObject, fails: bool) -> None:
        index = data.draw(st.integers(0, len(self.device.pending) - 1))
        self.device.finish(index, AdapterCorrupt("checksum differs") if fails else None)

    @rule()
    def poll(self) -> None:
        landed = {load.ref.image_key: load.future.exception() for load in self.device.landed}
        committed = len(self.device.commits)
        failed = dict(self.slots.poll())
        assert failed == {key: error for key, error in landed.items() if error is not None}
        ready = self.device.commits[committed:]
        assert set(ready) == set(landed) - set(failed) - self.dropped
        self.dropped -= set(landed)
        self.pins.update(dict.fromkeys(ready, self.now + SOFT_PIN_S))
        self.sure_pins.update(dict.fromkeys(ready, self.now + SOFT_PIN_S))
        assert not self.device.landed

    @rule(ref=refs)
    def drop(self, ref: AdapterRef) -> None:
        slot = self._ready_slot(ref.image_key)
        is_idle = slot is not None and not self.device.in_use[slot]
        is_loading = any(load.ref.image_key == ref.image_key for load in self._loads())
        assert self.slots.drop(ref.image_key) is is_idle
        if is_idle:
            assert self._ready_slot(ref.image_key) is None
            self.sure_pins.pop(ref.image_key, None)
        elif slot is not None or is_loading:
            self.dropped.add(ref.image_key)

    @rule(seconds=st.sampled_from([0.1, 1.0, SOFT_PIN_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def refuse_too_large(self) -> None:
        self.slots.prefetch(TOO_LARGE)
        with pytest.raises(AdapterTooLarge, match="adapter-memory"):
            self.slots.acquire(TOO_LARGE)

    # --- invariants --------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        self.slots.check_integrity()
        table = self.device.table
        assert {slot: (ref.image_key, offset) for slot, ref, offset in self.slots.residents()} == {
            slot: (ref.image_key, offset) for slot, (ref, offset) in table.items()
        }
        assert self.slots.resident == len(table) and self.slots.num_loading == len(self._loads())
        assert self.slots.bytes_used == sum(
            region_bytes(ref.data_bytes) for ref in [r for r, _ in table.values()] + [x.ref for x in self._loads()]
        )
        assert len({ref.image_key for ref, _ in table.values()}) == len(table), "one content in two slots"

    @invariant()
    def every_ready_region_holds_its_image(self) -> None:
        self.device.check_bytes()
        assert not any(self.device.arena[ARENA:])

    @invariant()
    def what_is_held_stays_where_it_is(self) -> None:
        for ref, slot, offset in self.held:
            resident, where = self.device.table[slot]
            assert resident.image_key == ref.image_key and where == offset
            assert self.slots.holds(slot, ref.image_key) and not self.slots.holds(slot, "another")

    def teardown(self) -> None:
        """However it was left: with everything released and the pins expired, whoever asks gets in."""
        while self.device.pending:
            self.device.finish(0)
        self.slots.poll()
        for _, slot, _ in self.held:
            self.device.in_use[slot] -= 1
            self.slots.release(slot)
        for ref in (REFS[-1], REFS[0]):
            self.now += SOFT_PIN_S
            if self.slots.acquire(ref)[0] is Acquire.LOADING:
                self.device.finish(0)
                assert self.slots.poll() == []
                outcome, slot = self.slots.acquire(ref)
                assert outcome is Acquire.READY
                self.slots.release(slot)
            else:
                assert self._ready_slot(ref.image_key) is not None
                self.slots.release(self._ready_slot(ref.image_key) or 0)
        self.books_agree()
        self.every_ready_region_holds_its_image()

    # --- the test's own view -----------------------------------------------------------------------------

    def _loads(self):
        return self.device.pending + self.device.landed

    def _ready_slot(self, key: str) -> int | None:
        return next((slot for slot, (ref, _) in self.device.table.items() if ref.image_key == key), None)

    def _assert_no_pinned_left(self, num_clears: int) -> None:
        """Whoever was evicted just now was not waiting for the request that had asked for it."""
        evicted = self.device.clears[num_clears:]
        assert not [key for key in evicted if self.sure_pins.get(key, 0.0) > self.now]
        for key in evicted:
            self.sure_pins.pop(key, None)

    def _assert_no_room(self, ref: AdapterRef) -> None:
        """FULL is right only if each stretch between fixed regions is too small, or no slot can go."""
        fixed = [(load.offset, load.end) for load in self._loads()]
        pinned = []
        num_evictable = 0
        for slot, (resident, offset) in self.device.table.items():
            region = (offset, offset + region_bytes(resident.data_bytes))
            if self.device.in_use[slot]:
                fixed.append(region)
            elif self.pins.get(resident.image_key, 0.0) > self.now:
                pinned.append(region)
            else:
                num_evictable += 1
        if num_evictable == 0 and len(self.device.table) + len(self._loads()) == MAX_SLOTS - 1:
            return
        low = 0
        for start, end in [*sorted(fixed), (ARENA, ARENA)]:
            kept = sum(high - base for base, high in pinned if low <= base < start)
            assert start - low - kept < region_bytes(ref.data_bytes), f"room for {ref} in [{low}, {start})"
            low = end


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
