"""What one site does with the segments of a step: which of them share a batched product.

    segments ──▶ batches: equal row count and equal ranks, one member of weight 1, no bias
             └─▶ summed:  the rest (sets, weights, a bias somewhere), one by one through an fp32 sum

A plan is views and row numbers, no weights. It is kept per site until the segments or the table change,
so a decode step with the composition of the last one costs one comparison here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch

from kernels.sites import Site
from kernels.torch_backend.views import SiteViews, SlotSites
from kernels.types import Segments, SiteGroup, SlotWeights

MAX_BATCHED_ROWS = 64
"""Longer segments run alone: their product is worth a launch, and their rows need no gathering."""
MAX_BATCH_BYTES = 8 << 20
"""Weights gathered for one batch: transient, and small enough to be still in cache when they are read."""

PlainSegment = tuple[int, int, tuple[Site | None, ...]]
"""First row, end row, and the only member's site per slice: the delta is just B A x."""


@dataclass(slots=True)
class Expand:
    """One slice of a batch: y[:, columns] += v[..., ranks] B^T."""

    columns: slice
    ranks: slice
    ups: list[torch.Tensor]  # B [N, R] per segment


@dataclass(slots=True)
class SegmentBatch:
    """Segments with equal row count and, slice by slice, equal ranks: one product each way."""

    spans: list[tuple[int, int]]  # first row and end row of each segment
    rows: slice | torch.Tensor  # all of them in order: a slice where they adjoin, int64 row numbers where not
    downs: list[torch.Tensor]  # A [R, K] per segment and present slice, segment by segment
    expands: list[Expand]


@dataclass(slots=True)
class Summed:
    """One slice of one segment whose delta is a weighted sum, or has a bias."""

    rows: slice
    columns: slice
    members: list[tuple[float, Site]]


@dataclass(slots=True)
class SitePlan:
    batches: list[SegmentBatch] = field(default_factory=list)
    summed: list[Summed] = field(default_factory=list)


@dataclass(slots=True)
class Planner:
    """Makes and keeps the plans over one arena; lives in `SlotWeights.scratch`."""

    views: SiteViews = field(default_factory=SiteViews)
    plans: dict[tuple[int, ...], tuple[object, SitePlan]] = field(default_factory=dict)

    def plan(self, weights: SlotWeights, group: SiteGroup, segments: Segments, device: torch.device) -> SitePlan:
        """The plan of one site; K 0 is an embedding."""
        signature = (weights.version, *segments.starts, *segments.ends, *segments.members)
        kept = self.plans.get(group.rows)
        if kept is not None and kept[0] == signature:
            return kept[1]
        self.views.refresh(weights, segments)
        plan = self._make(weights, group, segments, device)
        self.plans[group.rows] = (signature, plan)
        return plan

    def _make(self, weights: SlotWeights, group: SiteGroup, segments: Segments, device: torch.device) -> SitePlan:
        plan = SitePlan()
        alike: dict[object, list[PlainSegment]] = {}
        for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
            if start == end:
                continue
            found = [(weight, self.views.get(weights, slot, group)) for slot, weight in members]
            if len(found) != 1 or found[0][0] != 1.0 or found[0][1].has_bias:
                plan.summed.extend(_summed(slice(start, end), found, group))
                continue
            sites, ranks, _ = found[0][1]
            if any(ranks):
                key = (end - start, ranks) if end - start <= MAX_BATCHED_ROWS else start
                alike.setdefault(key, []).append((start, end, sites))
        for same in alike.values():
            plan.batches.extend(_batch(part, group, device) for part in _split(same))
        return plan


def planner_of(weights: SlotWeights) -> Planner:
    """The arena's own planner, made at first use."""
    planner = weights.scratch.get("torch")
    if planner is None:
        planner = weights.scratch["torch"] = Planner()
    return cast(Planner, planner)


def _summed(rows: slice, found: list[tuple[float, SlotSites]], group: SiteGroup) -> Iterator[Summed]:
    """The slices of a segment that any member has."""
    for index, (offset, width) in enumerate(zip(group.offsets, group.widths, strict=True)):
        present = [(weight, site) for weight, slot in found if (site := slot.sites[index]) is not None]
        if present:
            yield Summed(rows, slice(offset, offset + width), present)


def _split(same: list[PlainSegment]) -> Iterator[list[PlainSegment]]:
    """Parts whose weights stay below MAX_BATCH_BYTES, at least one segment each."""
    each = sum(t.numel() * t.element_size() for site in same[0][2] if site is not None for t in (site.a, site.b))
    count = max(1, MAX_BATCH_BYTES // each)
    return (same[first : first + count] for first in range(0, len(same), count))


def _batch(same: list[PlainSegment], group: SiteGroup, device: torch.device) -> SegmentBatch:
    spans = [(start, end) for start, end, _ in same]
    expands, rank = [], 0
    for index, first in enumerate(same[0][2]):
        if first is not None:
            columns = slice(group.offsets[index], group.offsets[index] + group.widths[index])
            ups = [cast(Site, sites[index]).b for _, _, sites in same]
            expands.append(Expand(columns, slice(rank, rank + first.b.shape[1]), ups))
            rank += first.b.shape[1]
    downs = [site.a for _, _, sites in same for site in sites if site is not None]
    return SegmentBatch(spans, _rows(spans, device), downs, expands)


def _rows(spans: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.tensor(list(_flat(spans)), device=device)


def _flat(spans: Iterable[tuple[int, int]]) -> Iterator[int]:
    return (row for start, end in spans for row in range(start, end))
