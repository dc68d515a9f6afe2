"""Pinned images: loaded when there is room, moved but never evicted; and what the slots tell of their changes."""

from __future__ import annotations

import random

import pytest

from adapters_store.errors import AdapterCorrupt
from server.adapters.slots import SOFT_PIN_S, Acquire
from server.engine.messages import SlotChange
from server.engine.residents import Residents
from tests.unit.byte_device import PAGE, make_ref
from tests.unit.test_slots import Rig

A, B, C, D = (make_ref(key, PAGE) for key in "abcd")


def resident(rig: Rig) -> set[str]:
    return {ref.image_key for _, ref, _ in rig.slots.residents()}


def test_a_pin_loads_its_image():
    rig = Rig(pages=2)
    rig.slots.pin(A)
    assert rig.slots.num_loading == 1
    rig.land()
    assert resident(rig) == {"a"}


def test_a_pinned_image_outlives_every_newcomer():
    rig = Rig(pages=2)
    rig.slots.pin(A)
    rig.land()
    for ref in (B, C, D, B, C):
        rig.now += SOFT_PIN_S
        rig.hold(ref)
        rig.release(ref)
        assert "a" in resident(rig)
    rig.now += SOFT_PIN_S
    assert rig.acquire(make_ref("large", 2 * PAGE)) is Acquire.FULL
    rig.slots.drop("a")
    assert rig.acquire(make_ref("large", 2 * PAGE)) is Acquire.LOADING


def test_a_pinned_image_is_moved_to_close_a_gap():
    rig = Rig(pages=4)
    rig.idle(A, B, C)
    rig.slots.pin(B)
    rig.now += 2 * SOFT_PIN_S
    rig.hold(make_ref("large", 3 * PAGE))
    assert resident(rig) == {"b", "large"}


def test_a_pin_waits_for_room():
    rig = Rig(pages=1)
    rig.hold(A)
    rig.slots.pin(B)
    assert rig.slots.num_loading == 0
    rig.release(A)
    rig.now += SOFT_PIN_S
    rig.slots.poll()
    rig.land()
    assert resident(rig) == {"b"}


def test_a_dropped_image_that_is_pinned_stays():
    rig = Rig(pages=2)
    rig.hold(A)
    assert rig.slots.drop("a") is False
    rig.slots.pin(A)
    rig.release(A)
    assert resident(rig) == {"a"}


def test_a_pin_in_use_that_is_dropped_goes_after_its_last_use():
    rig = Rig(pages=2)
    rig.slots.pin(A)
    rig.land()
    rig.hold(A)
    assert rig.slots.drop("a") is False
    assert resident(rig) == {"a"}
    rig.release(A)
    assert resident(rig) == set()
    rig.slots.poll()
    assert rig.slots.num_loading == 0, "a dropped pin is not loaded again"


def test_a_pin_that_cannot_load_is_told_once_and_let_go():
    rig = Rig(pages=2)
    rig.slots.pin(A)
    rig.land(AdapterCorrupt("checksum differs"))
    assert rig.slots.take_changes() == [SlotChange("a", "failed", "checksum differs")]
    rig.slots.poll()
    assert rig.slots.num_loading == 0
    rig.slots.pin(make_ref("huge", 3 * PAGE))
    (change,) = rig.slots.take_changes()
    assert (change.image_key, change.state) == ("huge", "failed") and "adapter-memory" in change.message
    rig.check()


def test_changes_are_told_once_in_order():
    rig = Rig(pages=1)
    rig.idle(A)
    rig.now += SOFT_PIN_S
    rig.idle(B)
    assert rig.slots.take_changes() == [SlotChange("a", "ready"), SlotChange("a", "gone"), SlotChange("b", "ready")]
    assert rig.slots.take_changes() == []


@pytest.mark.parametrize("seed", range(20))
def test_residents_follow_the_slots(seed):
    """Random operations: the other side's set is always what the slots hold, and pins that fitted are there."""
    rng = random.Random(seed)
    rig = Rig(pages=8, max_slots=6)
    refs = [make_ref(f"k{i}", size * PAGE) for i, size in enumerate((1, 1, 2, 2, 3, 4, 5))]
    residents, held, pinned = Residents(), [], set()
    for _ in range(300):
        ref = rng.choice(refs)
        match rng.randrange(7):
            case 0 | 1:
                if rig.acquire(ref) is Acquire.READY:
                    held.append(ref)
            case 2:
                if held:
                    rig.release(held.pop(rng.randrange(len(held))))
            case 3:
                rig.land(AdapterCorrupt("damaged") if rng.random() < 0.1 else None)
            case 4:
                rig.slots.drop(ref.image_key)
                pinned.discard(ref.image_key)
            case 5:
                if len(pinned) < 2 and ref.data_bytes <= 2 * PAGE:
                    rig.slots.pin(ref)
                    pinned.add(ref.image_key)
            case 6:
                rig.now += rng.choice((0.1, SOFT_PIN_S))
        changes = rig.slots.take_changes()
        for change in changes:
            if change.state == "failed":
                pinned.discard(change.image_key)
            assert change.state != "gone" or change.image_key not in pinned, "a pinned image was evicted"
        residents.apply(changes)
        now_there = resident(rig)
        assert {ref.image_key for ref in refs if ref.image_key in residents} == now_there
        assert len(residents) == len(now_there)
        rig.check()
