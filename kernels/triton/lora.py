"""segmented_lora in Triton: two launches for all slices of a packed projection. Contract in kernels/ops.py.

    x ──shrink──▶ v [parts of K, (entry, row), slice, rank] in fp32 ──expand──▶ y

v is not zeroed: what the expand reads, the shrink has written.
"""

from __future__ import annotations

import torch

from kernels.triton.expand import expand
from kernels.triton.launch import Gpu, Launch, expand_shape, geometry_of, gpu_of, is_aligned, options_of, shrink_shape
from kernels.triton.plan import DeviceSegments, device_segments
from kernels.triton.shrink import shrink
from kernels.types import Segments, SiteGroup, SlotWeights


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    """See kernels/ops.py."""
    plan = device_segments(segments, weights, len(y))
    if plan.max_tiles:
        for launch in lora_launches(y, x, weights, group, plan, gpu_of(y.device)):
            launch()


def lora_launches(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, plan: DeviceSegments, gpu: Gpu
) -> tuple[Launch, Launch]:
    """The shrink and the expand, for `gpu`."""
    shape = shrink_shape(plan, group.in_features, len(group.rows), gpu)
    width = len(group.rows) * plan.rank_bucket
    v = torch.empty((shape.splits, plan.max_members, width), dtype=torch.float32, device=y.device)
    down = Launch(
        shrink,
        shape.grid,
        (
            x,
            v,
            weights.arena,
            weights.table,
            plan.records,
            geometry_of(group, weights),
            group.in_features,
            x.stride(0),
            weights.table.shape[1],
            v.stride(0),
            shape.num_k,
        ),
        {
            "NUM_SLICES": len(group.rows),
            "BUCKET": plan.rank_bucket,
            "PARTS": shape.parts,
            "FEW": shape.few,
            "BLOCK_M": plan.tile_rows,
            "BLOCK_R": shape.block_r,
            "BLOCK_K": shape.block_k,
            "IS_SINGLE": shape.num_k == 1,
            "STAGES": shape.stages,
        },
        options_of(plan, gpu, shape.warps, shape.stages),
    )
    return down, expand_launch(y, v, weights, group, plan, gpu, shape.splits)


def expand_launch(
    y: torch.Tensor,
    source: torch.Tensor,
    weights: SlotWeights,
    group: SiteGroup,
    plan: DeviceSegments,
    gpu: Gpu,
    splits: int,
) -> Launch:
    """The expand. `source` is the shrink's v in `splits` parts; or an embedding's ids, and `splits` 0."""
    shape = expand_shape(plan, group.widths, gpu)
    return Launch(
        expand,
        shape.grid,
        (
            y,
            source,
            weights.arena,
            weights.table,
            plan.records,
            geometry_of(group, weights),
            y.stride(0),
            weights.table.shape[1],
            source.stride(0),
            shape.span,
        ),
        {
            "NUM_SLICES": len(group.rows),
            "BUCKET": plan.rank_bucket,
            "SPLITS": splits,
            "HAS_SETS": plan.has_sets,
            "EMBEDDING": splits == 0,
            "ALIGNED": is_aligned(group),
            "FEW": shape.few,
            "BLOCK_M": plan.tile_rows,
            "BLOCK_N": shape.block_n,
            "BLOCK_R": shape.block_r,
            "STAGES": shape.stages,
        },
        options_of(plan, gpu, shape.warps, shape.stages),
    )
