"""Views into the arena per (slot, table row), kept while the slot's table rows stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.sites import Site, read_site
from kernels.types import Segments, SlotWeights

MAX_SLOTS = 128
"""Slots whose views are kept (about 0.2 MB of Python objects each); a step with more keeps its own."""


@dataclass(slots=True)
class SiteViews:
    """Lives in `SlotWeights.scratch`, so views never outlive their arena or meet another one."""

    version: int = -1
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # copy on the host
    slots: dict[int, dict[int, Site | None]] = field(default_factory=dict)  # least recently planned first

    def refresh(self, weights: SlotWeights, segments: Segments) -> None:
        """Forget the slots whose table rows changed since the last call, and the least recently used ones."""
        if self.version != weights.version:
            table = weights.table.to("cpu", copy=True)
            if table.shape == self.table.shape:
                changed = (table != self.table).any(-1).any(-1)
                for slot in [slot for slot in self.slots if changed[slot]]:
                    del self.slots[slot]
            else:
                self.slots.clear()
            self.version, self.table = weights.version, table
        wanted = {slot for members in segments.members for slot, _ in members}
        for slot in wanted:
            self.slots[slot] = self.slots.pop(slot, {})
        for slot in list(self.slots)[: max(0, len(self.slots) - max(MAX_SLOTS, len(wanted)))]:
            del self.slots[slot]

    def get(self, weights: SlotWeights, slot: int, row: int, in_features: int, width: int) -> Site | None:
        """The site with padded rank; None where it is absent. Only for slots of the last `refresh`."""
        sites = self.slots[slot]
        if row not in sites:
            sites[row] = read_site(weights.arena, self.table[slot, row].tolist(), in_features, width, padded=True)
        return sites[row]
