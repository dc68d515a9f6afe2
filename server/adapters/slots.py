"""The device arena's bookkeeping: which adapter image is where, who uses it, who may go. No torch.

    image:   absent ──start──▶ LOADING ──poll──▶ READY ──evict / drop──▶ absent
                                  └──failed──▶ absent (not remembered: the next acquire tries again)

A READY image with refs is never touched. One without is idle: least recently used first, those that
requests are in line for after all others, it is evicted for a newcomer, or moved to close a gap.
A pinned one is moved, never evicted. All calls come from the engine thread, between steps;
a ref is released only after the last step that used it was collected, so no step in flight ever reads
a region that is freed, moved or loaded into here.
"""

from __future__ import annotations

import enum
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Protocol

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import AdapterRef
from server.adapters.gaps import Gap, Image, choose_gap
from server.adapters.regions import Regions, region_bytes
from server.engine.messages import SlotChange
from server.errors import ConfigError

SOFT_PIN_S = 5.0


class Acquire(enum.Enum):
    READY = "ready"  # one ref was taken
    LOADING = "loading"  # a load was started or runs; ask again
    FULL = "full"  # what is in use, loading or just loaded leaves no room; ask again


class SlotDevice(Protocol):
    """The memory behind the bookkeeping; see arena.py."""

    def load(self, ref: AdapterRef, slot: int, offset_bytes: int) -> Future[None]:
        """Begin to copy the image to its region, on another thread; done means that it was verified."""

    def commit(self, ref: AdapterRef, slot: int, offset_bytes: int) -> None:
        """Write the slot's table rows. Cannot fail: what can go wrong went wrong in the load."""

    def clear(self, slot: int) -> None:
        """Make every site of the slot absent. Also called for slots that were never committed."""

    def move(self, ref: AdapterRef, slot: int, old_offset: int, new_offset: int, nbytes: int) -> None:
        """Move a committed image (the ranges may overlap) and rewrite its table rows."""

    def check_table(self, residents: Iterable[tuple[int, AdapterRef, int]]) -> None:
        """Assert that the table has exactly these (slot, ref, offset)."""


class AdapterSlots:
    """Slots 1 .. max_slots - 1 over an arena of bytes. Slot 0 is "no adapter". Identity is the image key.

    Soft pins keep what was just loaded from being evicted before the request that asked for it comes
    round (else two waiting adapters evict each other for ever), and never block for long:
    - a pin lasts `soft_pin_s` from the end of the load, or until the first acquire;
    - prefetches together pin at most half the bytes and half the slots;
    - while an acquire was answered FULL within the last `soft_pin_s`, nothing is prefetched.

    A prefetch never evicts what requests are in line for: those that come for it would have to load it again.
    """

    def __init__(
        self,
        *,
        arena_bytes: int,
        max_slots: int,
        device: SlotDevice,
        clock: Callable[[], float] = time.monotonic,
        soft_pin_s: float = SOFT_PIN_S,
    ) -> None:
        if max_slots < 2:
            raise ConfigError(f"max_slots is {max_slots}; adapters need at least 2 (slot 0 is the base's)")
        self._device = device
        self._clock = clock
        self._soft_pin_s = soft_pin_s
        self._max_slots = max_slots
        self._regions = Regions(arena_bytes)
        self._images: dict[str, Image] = {}  # by image key
        self._by_slot: dict[int, Image] = {}
        self._loading: dict[str, Image] = {}  # in order of start
        self._idle: dict[str, Image] = {}  # READY, no refs, not dropped; least recently used first
        # first in, first out: a freed id comes back last, so a stale one meets an absent slot
        self._free_slots = deque(range(1, max_slots))
        self._wanted: set[str] = set()  # image keys that requests are in line for
        self._pins: dict[str, AdapterRef] = {}  # never evicted; loaded as soon as there is room
        self._changes: list[SlotChange] = []
        self._unmet_until = 0.0  # no prefetch before: an acquire was answered FULL
        # Every waiting request asks in every step, so "no" is remembered until something frees room: no
        # region of this many bytes or more before that time.
        self._full_bytes = 0
        self._full_until = 0.0
        self.acquires = 0
        self.loads = 0
        self.evictions = 0
        self.moved_bytes = 0

    # --- what the scheduler calls ------------------------------------------------------------------------

    def acquire(self, ref: AdapterRef) -> tuple[Acquire, int]:
        """READY takes one ref and gives its slot; otherwise the slot is 0 and nothing is held. Never blocks.

        Raises AdapterTooLarge when the image can't fit into the empty arena.
        """
        image = self._images.get(ref.image_key)
        if image is None:
            image = self._start(ref)
        if image is None:
            self._unmet_until = self._clock() + self._soft_pin_s
            return Acquire.FULL, 0
        image.is_prefetched = False
        if image.load is not None:
            return Acquire.LOADING, 0
        self._leave_idle(image)
        image.refs += 1
        self.acquires += 1
        return Acquire.READY, image.slot

    def release(self, slot: int) -> None:
        """Drop one ref. Call it only after the last step that used the slot was collected."""
        image = self._by_slot.get(slot)
        assert image is not None and image.refs > 0, f"slot {slot} is released more often than acquired"
        image.refs -= 1
        if image.refs == 0 and image.is_dropped:
            self._forget(image)
        elif image.refs == 0:
            self._become_idle(image)

    def want(self, image_key: str, is_wanted: bool) -> None:
        """Whether requests are in line for an image: it then goes after those that nobody waits for."""
        (self._wanted.add if is_wanted else self._wanted.discard)(image_key)

    def is_ready(self, image_key: str) -> bool:
        """Whether an acquire would be READY."""
        image = self._images.get(image_key)
        return image is not None and image.load is None

    def makes_room(self, image_key: str, ref: AdapterRef) -> bool:
        """Whether the region of a READY image, once it is idle, is enough for an absent one."""
        image = self._images[image_key]
        return image_key not in self._pins and image.nbytes >= region_bytes(ref.data_bytes)

    def prefetch(self, ref: AdapterRef) -> None:
        """Start a load that a waiting request will ask for, or pin its idle image; not under pressure."""
        now = self._clock()
        image = self._images.get(ref.image_key)
        if now < self._unmet_until or (image is not None and ref.image_key not in self._idle):
            return
        if not self._may_prefetch(ref, now):
            return
        if image is None:
            image = self._start(ref, may_evict_wanted=False)
        else:
            self._leave_idle(image)
            self._become_idle(image)
            image.pinned_until = now + self._soft_pin_s
        if image is not None:
            image.is_prefetched = True

    def poll(self) -> list[tuple[str, Exception]]:
        """Make finished loads READY; returns (image key, error) of failed ones. Call it before schedule()."""
        failed: list[tuple[str, Exception]] = []
        for key, image in list(self._loading.items()):
            if image.load is None or not image.load.done():
                continue
            error = image.load.exception()
            image.load = None
            del self._loading[key]
            if isinstance(error, Exception):
                failed.append((key, error))
                self._unpin_failed(key, error)
            if error is not None or image.is_dropped:
                self._forget(image)
            else:
                self._make_ready(image)
        self._load_pinned()
        return failed

    def pin(self, ref: AdapterRef) -> None:
        """Load an image as soon as there is room and never evict it, until drop(); one whose load fails is let go."""
        self._pins[ref.image_key] = ref
        if (image := self._images.get(ref.image_key)) is not None:
            image.is_dropped = False
        self._load_pinned()

    def drop(self, image_key: str) -> bool:
        """Forget an image: an idle one now (True), one in use or loading as soon as it is neither (False)."""
        self._pins.pop(image_key, None)
        image = self._images.get(image_key)
        if image is None:
            return False
        if image_key in self._idle:
            self._forget(image)
            return True
        image.is_dropped = True
        return False

    def holds(self, slot: int, image_key: str) -> bool:
        """Whether `slot` is in use and holds that image: what a batch asserts of each of its rows."""
        image = self._by_slot.get(slot)
        return image is not None and image.refs > 0 and image.ref.image_key == image_key

    def take_changes(self) -> list[SlotChange]:
        """What came, went or failed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    # --- what it holds -----------------------------------------------------------------------------------

    @property
    def resident(self) -> int:
        """READY images."""
        return len(self._images) - len(self._loading)

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def bytes_used(self) -> int:
        """Bytes of all regions, loading ones included."""
        return self._regions.used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._regions.capacity

    def residents(self) -> Iterator[tuple[int, AdapterRef, int]]:
        """(slot, ref, offset) of each READY image."""
        return ((image.slot, image.ref, image.offset) for image in self._images.values() if image.load is None)

    def check_integrity(self) -> None:
        """Assert that the books agree with each other and with the device's table."""
        self._device.check_table(self.residents())
        images = self._images.values()
        self._regions.check({image.offset: image.nbytes for image in images})
        assert len({image.offset for image in images}) == len(images), "two images share a region"
        assert self._by_slot == {image.slot: image for image in images}, "two images share a slot"
        slots = sorted([*self._by_slot, *self._free_slots])
        assert slots == list(range(1, self._max_slots)), f"slots lost or doubled: {slots}"
        assert self._loading == {i.ref.image_key: i for i in images if i.load is not None}
        idle = {i.ref.image_key: i for i in images if i.load is None and i.refs == 0}
        assert self._idle == idle, "an image without refs is not idle, or one with refs is"
        for key, image in self._images.items():
            assert key == image.ref.image_key and image.nbytes == region_bytes(image.ref.data_bytes)
            assert image.refs >= 0 and (image.load is None or image.refs == 0)
            assert not image.is_dropped or image.refs > 0 or image.load is not None

    # --- transitions -------------------------------------------------------------------------------------

    def _start(self, ref: AdapterRef, *, may_evict_wanted: bool = True) -> Image | None:
        """Begin to load an absent image; None, with nothing changed, when there is no room."""
        nbytes = region_bytes(ref.data_bytes)
        if nbytes > self._regions.capacity:
            raise AdapterTooLarge(
                f"adapter {ref.name!r} takes {nbytes} bytes on the device and the adapter memory is "
                f"{self._regions.capacity} bytes; raise --adapter-memory"
            )
        offset = self._make_room(nbytes, self._clock(), may_evict_wanted)
        if offset is None:
            return None
        slot = self._free_slots[0]
        image = Image(ref, slot, offset, nbytes, self._device.load(ref, slot, offset))
        self._free_slots.popleft()
        self._regions.take(offset, nbytes)
        self._images[ref.image_key] = self._by_slot[slot] = self._loading[ref.image_key] = image
        return image

    def _load_pinned(self) -> None:
        for key, ref in list(self._pins.items()):
            if key not in self._images:
                try:
                    self._start(ref)
                except AdapterTooLarge as error:
                    self._unpin_failed(key, error)

    def _unpin_failed(self, key: str, error: Exception) -> None:
        """A failure is told, and not tried again by itself: an image that stays damaged would be read for ever."""
        self._pins.pop(key, None)
        self._changes.append(SlotChange(key, "failed", str(error)))

    def _make_ready(self, image: Image) -> None:
        self._device.commit(image.ref, image.slot, image.offset)
        self._changes.append(SlotChange(image.ref.image_key, "ready"))
        self.loads += 1
        image.is_committed = True
        self._become_idle(image)
        image.pinned_until = self._clock() + self._soft_pin_s

    def _become_idle(self, image: Image) -> None:
        self._idle[image.ref.image_key] = image  # the most recently used comes last
        self._full_until = 0.0

    def _leave_idle(self, image: Image) -> None:
        if self._idle.pop(image.ref.image_key, None) is not None:
            image.pinned_until = 0.0

    def _forget(self, image: Image) -> None:
        """Free the slot and the region of an image that nobody uses and nobody loads."""
        assert image.refs == 0 and image.load is None, f"slot {image.slot} is in use"
        self._leave_idle(image)
        self._device.clear(image.slot)
        if image.is_committed:
            self._changes.append(SlotChange(image.ref.image_key, "gone"))
        self._regions.free(image.offset)
        del self._images[image.ref.image_key], self._by_slot[image.slot]
        self._free_slots.append(image.slot)
        self._full_until = 0.0

    def _evict(self, image: Image) -> None:
        self._forget(image)
        self.evictions += 1

    def _move(self, image: Image, offset: int) -> None:
        assert image.refs == 0 and image.load is None, f"slot {image.slot} is in use"
        self._regions.free(image.offset)
        self._regions.take(offset, image.nbytes)
        self._device.move(image.ref, image.slot, image.offset, offset, image.ref.data_bytes)
        self.moved_bytes += image.ref.data_bytes
        image.offset = offset

    # --- room --------------------------------------------------------------------------------------------

    def _may_prefetch(self, ref: AdapterRef, now: float) -> bool:
        """Whether prefetches would pin at most half of everything, this one included."""
        pinned = [
            image.nbytes
            for key, image in self._images.items()
            if image.is_prefetched and key != ref.image_key and (image.load is not None or image.pinned_until > now)
        ]
        is_slot_left = len(pinned) < max(1, (self._max_slots - 1) // 2)
        return is_slot_left and sum(pinned) + region_bytes(ref.data_bytes) <= self._regions.capacity // 2

    def _make_room(self, nbytes: int, now: float, may_evict_wanted: bool) -> int | None:
        """The offset of a free region, with a slot free too; None, and nothing changed, if that can't be.

        Moves before it evicts, evicts the least recently used first, and no more than it must.
        """
        if now < self._full_until and nbytes >= self._full_bytes:
            return None
        if self._free_slots and (offset := self._regions.find(nbytes)) is not None:
            return offset
        evictable = self._evictable(now, may_evict_wanted)
        gap = choose_gap(self._images.values(), self._regions.capacity, nbytes, evictable)
        if gap is None or not (self._free_slots or evictable):
            if may_evict_wanted:
                pins = (image.pinned_until for image in self._idle.values() if image.pinned_until > now)
                self._full_bytes, self._full_until = nbytes, min(pins, default=math.inf)
            return None
        if evictable and not self._free_slots and not gap.victims:
            self._evict(evictable[0])
            return self._make_room(nbytes, now, may_evict_wanted)
        self._empty(gap)
        return self._close_up(gap, nbytes)

    def _evictable(self, now: float, may_evict_wanted: bool) -> list[Image]:
        """The idle images that may go, in the order in which they do."""
        free = [image for key, image in self._idle.items() if image.pinned_until <= now and key not in self._pins]
        unwanted = [image for image in free if image.ref.image_key not in self._wanted]
        if not may_evict_wanted or len(unwanted) == len(free):
            return unwanted
        return unwanted + [image for image in free if image.ref.image_key in self._wanted]

    def _empty(self, gap: Gap) -> None:
        """Rid the gap of its victims: to a free place elsewhere if there is one, else for good."""
        for image in gap.victims:
            gap.idle.remove(image)
            elsewhere = self._find_outside(gap, image.nbytes) if self._free_slots else None
            if elsewhere is None:
                self._evict(image)
            else:
                self._move(image, elsewhere)

    def _find_outside(self, gap: Gap, nbytes: int) -> int | None:
        below = self._regions.find(nbytes, 0, gap.low)
        return below if below is not None else self._regions.find(nbytes, gap.high)

    def _close_up(self, gap: Gap, nbytes: int) -> int:
        """Slide the gap's idle images down, one by one, until `nbytes` in a row are free."""
        cursor = gap.low
        for image in gap.idle:
            offset = self._regions.find(nbytes, gap.low, gap.high)
            if offset is not None:
                return offset
            if image.offset != cursor:
                self._move(image, cursor)
            cursor = image.end
        offset = self._regions.find(nbytes, gap.low, gap.high)
        assert offset is not None, "the gap has fewer free bytes than was counted"
        return offset
