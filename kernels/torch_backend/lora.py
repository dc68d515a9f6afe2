"""Low-rank deltas in plain torch: cached views, few launches, no kept copies of weights.

Segments of one step that look alike (row count, up to 64, and ranks) run as one batched product over their
weights, gathered for the moment: on a CPU a 16-bit product costs some 20 us whatever its size, so 32
segments of one row pay 64 of those in a loop and 2 here. A packed projection's slices share the first
product: v = x [Aq; Ak; Av]^T. A lone segment is not gathered. `multilora bench kernels`
measures both.

Rounding in 16 bit: v = A x is rounded once, then y + B v is summed in fp32 and rounded once. Through the
fp32 sum (sets, weights, biases) each member's B v is rounded before it is weighted and added. PEFT rounds
A x, B A x, its scaled form, and the sum. In fp32 nothing is rounded on the way.
"""

from __future__ import annotations

import torch

from kernels.sites import Site
from kernels.torch_backend.plan import Expand, SegmentBatch, Summed, planner_of
from kernels.types import Segments, SiteGroup, SlotWeights


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    """See kernels/ops.py."""
    plan = planner_of(weights).plan(weights, group, segments, y.device)
    for batch in plan.batches:
        _expand(y, _shrink(x, batch), batch)
    for summed in plan.summed:
        _add_sum(y, x[summed.rows], summed)


def segmented_embedding(y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments) -> None:
    """See kernels/ops.py. A x is a row of A per token; the rest is as for a linear."""
    group = SiteGroup(rows=(row,), offsets=(0,), widths=(y.shape[1],), in_features=0)
    plan = planner_of(weights).plan(weights, group, segments, y.device)
    for batch in plan.batches:
        looked_up = [a[ids[start:end]] for a, (start, end) in zip(batch.downs, batch.spans, strict=True)]
        _expand(y, torch.stack(looked_up), batch)
    for summed in plan.summed:
        _add_sum(y, ids[summed.rows], summed, is_embedding=True)


def _shrink(x: torch.Tensor, batch: SegmentBatch) -> torch.Tensor:
    """v [segments, rows of one, sum of the slices' R]."""
    count = len(batch.spans)
    rows = x[batch.rows].unflatten(0, (count, -1))  # [segments, rows of one, K]
    down = _joined(batch.downs).unflatten(0, (count, -1))  # [segments, sum R, K]
    return torch.bmm(rows, down.transpose(1, 2))


def _expand(y: torch.Tensor, v: torch.Tensor, batch: SegmentBatch) -> None:
    for expand in batch.expands:
        target = y[:, expand.columns]
        if isinstance(batch.rows, slice):
            _add_product(target[batch.rows], v, expand)
        else:
            gathered = target.index_select(0, batch.rows)
            _add_product(gathered, v, expand)
            target.index_copy_(0, batch.rows, gathered)


def _add_product(target: torch.Tensor, v: torch.Tensor, expand: Expand) -> None:
    """target [segments * rows, N] += v B^T, segment by segment, rounded once."""
    count = len(expand.ups)
    up = _joined(expand.ups).unflatten(0, (count, -1))  # [segments, N, R]
    target.unflatten(0, (count, -1)).baddbmm_(v[..., expand.ranks], up.transpose(1, 2))


def _add_sum(y: torch.Tensor, x: torch.Tensor, summed: Summed, is_embedding: bool = False) -> None:
    """The general form for one segment and slice: fp32 sum over members, cast once."""
    target = y[summed.rows, summed.columns]
    total = target.float()
    for weight, site in summed.members:
        if site.b.shape[1]:
            total = total.add(_delta(x, site, is_embedding), alpha=weight)
        if site.bias is not None:
            total = total.add(site.bias, alpha=weight)
    target.copy_(total)


def _delta(x: torch.Tensor, site: Site, is_embedding: bool) -> torch.Tensor:
    v = site.a[x] if is_embedding else x @ site.a.T
    return v @ site.b.T


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
