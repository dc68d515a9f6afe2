"""The segment plans of a step: which rows belong to which slot. Made once, shared by every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from kernels.types import Segments
from server.engine.batch import Batch

SlotCheck = Callable[[int, str], bool]
"""holds(slot, image key): whether the slot is READY, in use, and holds that image"""


def segments_of(batch: Batch, holds: SlotCheck | None = None) -> tuple[Segments, Segments]:
    """The plans over the rows of `batch` and over its head_rows (what the head sees).

    Neighbouring items of one slot share a segment; rows without an adapter (slot 0) are in none.
    Raises RuntimeError when a request's slot is not its adapter's: a row answered with another
    request's adapter is the one error that nobody would notice.
    """
    _check_slots(batch, holds)
    starts = batch.query_starts
    body = _merge((starts[i], starts[i + 1], slot) for i, slot in enumerate(batch.row_slots))
    items = np.searchsorted(starts, batch.head_rows, side="right") - 1
    head = _merge((row, row + 1, batch.row_slots[item]) for row, item in enumerate(items.tolist()))
    return body, head


def _merge(runs: Iterable[tuple[int, int, int]]) -> Segments:
    """Segments of adjoining (start, end, slot) runs, neighbours of one slot joined."""
    segments = Segments()
    last_slot = 0
    for start, end, slot in runs:
        if slot and slot == last_slot:
            segments.ends[-1] = end
        elif slot:
            segments.starts.append(start)
            segments.ends.append(end)
            segments.members.append(((slot, 1.0),))
        last_slot = slot
    return segments


def _check_slots(batch: Batch, holds: SlotCheck | None) -> None:
    for item, slot in zip(batch.items, batch.row_slots, strict=True):
        key = item.request.adapter_key
        sound = not key if slot == 0 else bool(key) and (holds is None or holds(slot, key))
        if not sound:
            name = item.request.request_id
            raise RuntimeError(f"request {name!r}: slot {slot} does not hold its adapter {key or '(none)'!r}")
