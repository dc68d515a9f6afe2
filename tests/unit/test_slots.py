"""AdapterSlots: one situation a test, on a device that holds real bytes."""

from __future__ import annotations

import pytest

from adapters_store.errors import AdapterCorrupt, AdapterTooLarge
from adapters_store.ref import AdapterRef
from server.adapters.regions import Regions, region_bytes
from server.adapters.slots import SOFT_PIN_S, Acquire, AdapterSlots
from server.errors import ConfigError
from tests.unit.byte_device import PAGE, ByteDevice, make_ref


class Rig:
    """Slots over a byte device, with a clock that the test turns."""

    def __init__(self, pages: int, max_slots: int = 16) -> None:
        self.now = 0.0
        self.device = ByteDevice(bytearray(pages * PAGE))
        self.slots = AdapterSlots(
            arena_bytes=pages * PAGE, max_slots=max_slots, device=self.device, clock=lambda: self.now
        )

    def acquire(self, ref: AdapterRef) -> Acquire:
        """Ask once; the device is told of a ref."""
        outcome, slot = self.slots.acquire(ref)
        if outcome is Acquire.READY:
            self.device.in_use[slot] += 1
        self.check()
        return outcome

    def land(self, error: Exception | None = None) -> list[tuple[str, Exception]]:
        """All loads end; poll."""
        while self.device.pending:
            self.device.finish(0, error)
        failed = self.slots.poll()
        self.check()
        return failed

    def hold(self, ref: AdapterRef) -> int:
        """Load, acquire, and give the slot."""
        if self.acquire(ref) is Acquire.LOADING:
            self.land()
            assert self.acquire(ref) is Acquire.READY
        return self.slot(ref)

    def release(self, ref: AdapterRef) -> None:
        slot = self.slot(ref)
        self.device.in_use[slot] -= 1
        self.slots.release(slot)
        self.check()

    def idle(self, *refs: AdapterRef) -> None:
        """Bring all in, then let go in this order: the first is the coldest."""
        for ref in refs:
            self.hold(ref)
        for ref in refs:
            self.release(ref)

    def slot(self, ref: AdapterRef) -> int:
        return next(slot for slot, (held, _) in self.device.table.items() if held.image_key == ref.image_key)

    def offset(self, ref: AdapterRef) -> int:
        return self.device.table[self.slot(ref)][1]

    @property
    def resident(self) -> set[str]:
        return {ref.image_key for ref, _ in self.device.table.values()}

    def check(self) -> None:
        self.slots.check_integrity()
        self.device.check_bytes()


def pages(key: str, count: int) -> AdapterRef:
    return make_ref(key, count * PAGE)


def test_first_acquire_loads_and_the_next_after_poll_is_ready():
    rig = Rig(8)
    a = pages("a", 2)
    assert rig.acquire(a) is Acquire.LOADING
    assert rig.acquire(a) is Acquire.LOADING and len(rig.device.pending) == 1
    rig.device.finish(0)
    assert rig.acquire(a) is Acquire.LOADING, "ready before its table rows are written"
    assert rig.device.table == {}
    assert rig.slots.poll() == [] and rig.slots.loads == 1
    assert rig.acquire(a) is Acquire.READY and rig.slot(a) != 0


def test_the_coldest_idle_image_goes_first_and_one_in_use_never():
    rig = Rig(6)
    a, b, c = pages("a", 2), pages("b", 2), pages("c", 2)
    rig.idle(a, b, c)
    rig.hold(a)  # the coldest is in use again
    assert rig.acquire(pages("d", 2)) is Acquire.LOADING
    assert rig.resident == {"a", "c"} and rig.slots.evictions == 1


def test_full_while_everything_is_in_use_and_nothing_is_lost_by_asking():
    rig = Rig(6)
    a, b, d = pages("a", 3), pages("b", 3), pages("d", 1)
    rig.hold(a)
    rig.hold(b)
    assert rig.acquire(d) is Acquire.FULL
    rig.release(b)
    assert rig.acquire(pages("e", 4)) is Acquire.FULL
    assert rig.resident == {"a", "b"}, "evicted for one that could not get in anyway"
    assert rig.acquire(d) is Acquire.LOADING


def test_no_more_is_evicted_than_is_needed():
    rig = Rig(8)
    small, large, rest = pages("small", 1), pages("large", 4), pages("rest", 3)
    rig.idle(small, large, rest)  # small is the coldest, but large alone is enough
    assert rig.acquire(pages("new", 4)) is Acquire.LOADING
    assert rig.resident == {"small", "rest"}


def test_idle_images_slide_together_before_any_is_evicted():
    rig = Rig(8)
    images = [pages(name, 2) for name in "abcd"]
    rig.idle(*images)
    rig.slots.drop("a")
    rig.slots.drop("c")  # free: pages 0-1 and 4-5
    assert rig.acquire(pages("new", 4)) is Acquire.LOADING
    assert rig.slots.evictions == 0 and rig.device.moves > 0 and rig.slots.moved_bytes > 0
    rig.land()
    assert rig.resident == {"b", "d", "new"}


def test_an_idle_image_moves_past_one_in_use_rather_than_go():
    rig = Rig(9)
    a, b, held, d = pages("a", 2), pages("b", 2), pages("held", 2), pages("d", 3)
    for ref in (a, b, held, d):
        rig.hold(ref)
    for ref in (a, b, d):
        rig.release(ref)
    rig.slots.drop("a")
    rig.slots.drop("d")  # [2 free][b][held][3 free]: four in a row only if b goes to the right
    where = rig.offset(held)
    assert rig.acquire(pages("new", 4)) is Acquire.LOADING
    assert rig.slots.evictions == 0 and rig.resident == {"b", "held"}
    assert rig.offset(held) == where and rig.offset(b) > where


def test_an_image_in_use_or_loading_is_never_moved():
    rig = Rig(6)
    a, b, c = pages("a", 2), pages("b", 2), pages("c", 2)
    for ref in (a, b, c):
        rig.hold(ref)
    rig.release(a)
    rig.release(c)
    rig.slots.drop("a")
    rig.slots.drop("c")  # [2 free][b in use][2 free]
    assert rig.acquire(pages("new", 3)) is Acquire.FULL
    assert rig.device.moves == 0
    rig.release(b)
    rig.slots.drop("b")
    for ref in (a, b):
        assert rig.acquire(ref) is Acquire.LOADING
    rig.device.finish(0)
    assert rig.slots.poll() == []
    rig.now += SOFT_PIN_S
    rig.slots.drop("a")  # [2 free][b loading][2 free]
    assert rig.acquire(pages("new", 3)) is Acquire.FULL
    assert rig.device.moves == 0


def test_when_slots_run_out_the_coldest_goes_though_bytes_are_free():
    rig = Rig(16, max_slots=3)
    a, b = pages("a", 1), pages("b", 1)
    rig.idle(a, b)
    assert rig.acquire(pages("c", 1)) is Acquire.LOADING
    assert rig.resident == {"b"}
    rig.hold(b)
    assert rig.acquire(pages("d", 1)) is Acquire.FULL


def test_a_freed_slot_comes_back_last():
    rig = Rig(16, max_slots=5)
    a = pages("a", 1)
    first = rig.hold(a)
    rig.release(a)
    rig.slots.drop("a")
    assert [rig.hold(pages(name, 1)) for name in "bcde"][-1] == first


def test_names_of_one_content_share_a_slot_and_a_replaced_adapter_has_its_own():
    rig = Rig(8)
    one, two = make_ref("same", PAGE, "sales/fr"), make_ref("same", PAGE, "support/fr")
    assert rig.hold(one) == rig.hold(two)
    replaced = make_ref("other", PAGE, "sales/fr")
    assert rig.hold(replaced) != rig.slot(one)
    assert rig.slots.holds(rig.slot(one), "same") and not rig.slots.holds(rig.slot(one), "other")


def test_too_large_names_adapter_size_and_limit_and_leaves_no_trace():
    rig = Rig(4)
    with pytest.raises(AdapterTooLarge, match=r"'big' takes 20480 bytes .* 16384 bytes"):
        rig.acquire(pages("big", 5))
    rig.slots.prefetch(pages("big", 5))
    rig.check()
    assert rig.slots.bytes_used == 0


def test_slots_without_room_for_an_adapter_are_a_configuration_error():
    with pytest.raises(ConfigError, match="max_slots is 1"):
        Rig(4, max_slots=1)


def test_a_failed_load_frees_its_region_and_is_not_remembered():
    rig = Rig(4)
    a = pages("a", 4)
    assert rig.acquire(a) is Acquire.LOADING
    error = AdapterCorrupt("checksum differs")
    assert rig.land(error) == [("a", error)]
    assert rig.slots.bytes_used == 0 and rig.slots.num_loading == 0 and rig.device.table == {}
    assert rig.acquire(a) is Acquire.LOADING
    assert rig.land() == [] and rig.acquire(a) is Acquire.READY


def test_who_was_told_full_gets_in_as_soon_as_a_load_fails_or_a_last_ref_of_a_dropped_image_goes():
    rig = Rig(4)
    a, b, c = pages("a", 4), pages("b", 4), pages("c", 3)
    assert rig.acquire(a) is Acquire.LOADING
    assert rig.acquire(b) is rig.acquire(c) is Acquire.FULL
    rig.land(AdapterCorrupt("checksum differs"))
    assert rig.acquire(b) is Acquire.LOADING
    rig.land()
    assert rig.acquire(b) is Acquire.READY
    rig.slots.drop("b")
    assert rig.acquire(c) is rig.acquire(a) is Acquire.FULL
    rig.release(b)
    assert rig.acquire(a) is Acquire.LOADING


def test_drop_of_an_idle_a_used_and_a_loading_image():
    rig = Rig(8)
    a, b = pages("a", 2), pages("b", 2)
    rig.idle(a)
    assert rig.slots.drop("a") and rig.resident == set()
    assert not rig.slots.drop("a")
    rig.hold(b)
    assert not rig.slots.drop("b") and rig.resident == {"b"}
    assert rig.acquire(b) is Acquire.READY, "its own requests keep it until the last has gone"
    rig.release(b)
    assert rig.resident == {"b"}
    rig.release(b)
    assert rig.resident == set()
    assert rig.acquire(a) is Acquire.LOADING
    assert not rig.slots.drop("a")
    assert rig.land() == [] and rig.resident == set() and rig.slots.loads == 2
    assert rig.slots.bytes_used == 0


def test_two_waiting_adapters_that_exclude_each_other_both_get_their_turn():
    """The thrash guard: asked in the worst order, each is still loaded only once."""
    rig = Rig(5)
    a, b = pages("a", 3), pages("b", 3)
    assert rig.acquire(a) is Acquire.LOADING
    rig.land()
    assert rig.acquire(b) is Acquire.FULL, "b evicted what a's request had not yet got"
    assert rig.acquire(a) is Acquire.READY
    rig.release(a)
    assert rig.acquire(b) is Acquire.LOADING
    rig.land()
    assert rig.acquire(a) is Acquire.FULL
    assert rig.acquire(b) is Acquire.READY
    assert rig.slots.loads == 2


def test_a_soft_pin_ends_when_nobody_comes_for_it():
    rig = Rig(4)
    a, b = pages("a", 4), pages("b", 4)
    assert rig.acquire(a) is Acquire.LOADING
    rig.land()
    rig.now += SOFT_PIN_S - 0.1
    assert rig.acquire(b) is Acquire.FULL
    rig.now += 0.1
    assert rig.acquire(b) is Acquire.LOADING


def test_a_pinned_image_may_move_but_not_go():
    rig = Rig(6)
    a, pinned = pages("a", 2), pages("pinned", 2)
    rig.hold(a)
    assert rig.acquire(pinned) is Acquire.LOADING
    rig.land()
    rig.release(a)
    rig.slots.drop("a")  # [2 free][pinned][2 free]
    assert rig.acquire(pages("new", 4)) is Acquire.LOADING
    assert rig.resident == {"pinned"} and rig.device.moves == 1


def test_a_prefetched_image_waits_for_its_request():
    rig = Rig(8)
    a = pages("a", 4)
    rig.slots.prefetch(a)
    rig.slots.prefetch(a)
    assert len(rig.device.pending) == 1
    rig.land()
    assert rig.acquire(pages("other", 5)) is Acquire.FULL
    assert rig.acquire(a) is Acquire.READY


def test_prefetch_pins_an_idle_image():
    rig = Rig(8)
    a, b = pages("a", 4), pages("b", 4)
    rig.idle(a, b)
    rig.slots.prefetch(a)  # the coldest; its request has arrived
    assert rig.acquire(pages("c", 4)) is Acquire.LOADING
    assert rig.resident == {"a"}


def test_prefetches_pin_at_most_half_the_bytes_and_half_the_slots():
    rig = Rig(8)
    for name in "abcdef":
        rig.slots.prefetch(pages(name, 1))
    assert len(rig.device.pending) == 4
    rig.land()
    rig.slots.prefetch(pages("g", 1))
    assert rig.device.pending == []
    assert rig.acquire(pages("a", 1)) is Acquire.READY  # no prefetch any more: its pin is a ref now
    rig.slots.prefetch(pages("g", 1))
    assert len(rig.device.pending) == 1

    tight = Rig(64, max_slots=5)
    for name in "abcd":
        tight.slots.prefetch(pages(name, 1))
    assert len(tight.device.pending) == 2


def test_an_acquire_takes_over_a_prefetch_so_that_another_may_follow():
    rig = Rig(8)
    rig.slots.prefetch(pages("a", 4))
    rig.slots.prefetch(pages("b", 4))
    assert [load.ref.image_key for load in rig.device.pending] == ["a"]
    assert rig.acquire(pages("a", 4)) is Acquire.LOADING
    rig.slots.prefetch(pages("b", 4))
    assert [load.ref.image_key for load in rig.device.pending] == ["a", "b"]


def test_prefetches_without_end_do_not_starve_a_request_that_needs_the_whole_arena():
    rig = Rig(8)
    big = pages("big", 8)
    outcome = Acquire.FULL
    for step in range(100):
        rig.slots.prefetch(pages(f"p{step}", 2))
        rig.slots.prefetch(pages(f"q{step}", 1))
        rig.land()
        outcome = rig.acquire(big)
        if outcome is not Acquire.FULL:
            break
        rig.now += 0.5
    assert outcome is Acquire.LOADING and rig.now <= SOFT_PIN_S


def test_releasing_more_often_than_acquiring_is_caught():
    rig = Rig(4)
    a = pages("a", 1)
    rig.idle(a)
    with pytest.raises(AssertionError, match="more often"):
        rig.slots.release(rig.slot(a))
    with pytest.raises(AssertionError, match="more often"):
        rig.slots.release(0)


def test_regions_are_whole_pages_found_first_fit_within_bounds():
    assert [region_bytes(count) for count in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]
    regions = Regions(8 * PAGE + 5)
    assert regions.capacity == 8 * PAGE
    for page, count in ((6, 1), (1, 2)):  # . # # . . . # .
        regions.take(page * PAGE, count * PAGE)
    assert regions.find(PAGE) == 0
    assert regions.find(2 * PAGE) == 3 * PAGE
    assert regions.find(4 * PAGE) is None
    assert regions.find(2 * PAGE, high=PAGE) is None
    assert regions.find(PAGE, low=3 * PAGE) == 3 * PAGE
    assert regions.find(PAGE, low=6 * PAGE) == 7 * PAGE
    regions.free(PAGE)
    assert regions.find(6 * PAGE) == 0 and regions.find(4 * PAGE, high=3 * PAGE) is None
    assert regions.find(8 * PAGE) is None
    regions.check({6 * PAGE: PAGE})
    regions.free(6 * PAGE)
    assert regions.find(2 * PAGE, high=PAGE) is None and regions.used_bytes == 0


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda slots: setattr(slots._images["a"], "refs", 1),
        lambda slots: setattr(slots._images["a"], "offset", PAGE // 2),
        lambda slots: setattr(slots._images["a"], "slot", 9),
        lambda slots: slots._free_slots.pop(),
        lambda slots: slots._free_slots.append(1),
        lambda slots: slots._idle.clear(),
        lambda slots: slots._regions.take(3 * PAGE, PAGE),
    ],
)
def test_check_integrity_sees_books_that_disagree(corrupt):
    rig = Rig(4)
    rig.idle(pages("a", 2))
    corrupt(rig.slots)
    with pytest.raises(AssertionError):
        rig.slots.check_integrity()
