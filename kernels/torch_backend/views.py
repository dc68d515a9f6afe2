"""Views into the arena per slot and packed projection, kept while the slot's table rows stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kernels.sites import Site, read_site
from kernels.types import Segments, SiteGroup, SlotWeights

MAX_SLOTS = 128
"""Slots whose views are kept (about 0.2 MB of Python objects each); a step with more keeps its own."""


class SlotSites(NamedTuple):
    """One slot's sites in one packed projection."""

    sites: tuple[Site | None, ...]  # per slice, with padded rank; None where absent
    ranks: tuple[int, ...]  # per slice, padded; 0 where absent
    has_bias: bool


@dataclass(slots=True)
class SiteViews:
    """Lives in `SlotWeights.scratch`, so views never outlive their arena or meet another one."""

    version: int = -1
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """copy on the host, as of `version`"""
    slots: dict[int, dict[tuple[int, ...], SlotSites]] = field(default_factory=dict)
    """by slot, the least recently planned first; then by SiteGroup.rows"""

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

    def get(self, weights: SlotWeights, slot: int, group: SiteGroup) -> SlotSites:
        """The slot's sites in `group`. Only for slots of the last `refresh`."""
        groups = self.slots[slot]
        found = groups.get(group.rows)
        if found is None:
            found = groups[group.rows] = self._read(weights, slot, group)
        return found

    def _read(self, weights: SlotWeights, slot: int, group: SiteGroup) -> SlotSites:
        sites = tuple(
            read_site(weights.arena, self.table[slot, row].tolist(), group.in_features, width, padded=True)
            for row, width in zip(group.rows, group.widths, strict=True)
        )
        ranks = tuple(0 if site is None else site.b.shape[1] for site in sites)
        return SlotSites(sites, ranks, any(site is not None and site.bias is not None for site in sites))
