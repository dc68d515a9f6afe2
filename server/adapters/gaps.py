"""Which idle images have to go so that a newcomer has room in a row: the arena cut at what can't be moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from adapters_store.ref import AdapterRef


@dataclass(slots=True, eq=False)
class Image:
    """An image in the arena. `slot`, `nbytes` (of its region) never change; `offset` only while idle."""

    ref: AdapterRef
    slot: int
    offset: int
    nbytes: int
    load: Future[None] | None  # None = READY
    refs: int = 0
    pinned_until: float = 0.0  # while idle: not evicted before this time
    is_prefetched: bool = False  # asked for by prefetch only: counts against the bound on prefetches
    is_committed: bool = False  # has been READY
    is_dropped: bool = False  # goes as soon as it is neither loading nor in use

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def is_idle(self) -> bool:
        """READY, nobody uses it, and not about to go: it may be moved or evicted."""
        return self.load is None and self.refs == 0 and not self.is_dropped


@dataclass(slots=True, eq=False)
class Gap:
    """The bytes between two regions that can't be moved, with the idle images in it, ascending."""

    low: int
    high: int
    idle: list[Image]
    free: int = 0
    victims: list[Image] = field(default_factory=list)


def choose_gap(images: Iterable[Image], capacity: int, nbytes: int, evictable: Sequence[Image]) -> Gap | None:
    """The gap that first comes to `nbytes` free bytes as idle images go one by one, its victims set; None if none does.

    evictable: the idle images that may go, in the order in which they do.
    """
    gaps = _cut(images, capacity)
    chosen = next((gap for gap in gaps if gap.free >= nbytes), None)
    gap_of = {image.slot: gap for gap in gaps for image in gap.idle}
    for image in evictable:
        if chosen is not None:
            break
        gap = gap_of[image.slot]
        gap.victims.append(image)
        gap.free += image.nbytes
        chosen = gap if gap.free >= nbytes else None
    if chosen is None:
        return None
    for image in reversed(chosen.victims[:-1]):  # a large last one may have made earlier ones needless
        if chosen.free - image.nbytes >= nbytes:
            chosen.victims.remove(image)
            chosen.free -= image.nbytes
    return chosen


def _cut(images: Iterable[Image], capacity: int) -> list[Gap]:
    """The arena cut at the regions in use or loading, in address order."""
    gaps: list[Gap] = []
    low, idle = 0, list[Image]()
    for image in sorted(images, key=lambda image: image.offset):
        if image.is_idle:
            idle.append(image)
        else:
            gaps.append(Gap(low, image.offset, idle))
            low, idle = image.end, []
    gaps.append(Gap(low, capacity, idle))
    for gap in gaps:
        gap.free = gap.high - gap.low - sum(image.nbytes for image in gap.idle)
    return gaps
