"""segmented_embedding in Triton: one launch, whose v is gathered from A [V, padded rank]. See kernels/ops.py."""

from __future__ import annotations

import torch

from kernels.triton.launch import gpu_of
from kernels.triton.lora import expand_launch
from kernels.triton.plan import device_segments
from kernels.types import Segments, SiteGroup, SlotWeights


def segmented_embedding(y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments) -> None:
    """See kernels/ops.py."""
    plan = device_segments(segments, weights, len(y))
    if plan.max_tiles:
        group = SiteGroup(rows=(row,), offsets=(0,), widths=(y.shape[1],), in_features=0)
        expand_launch(y, ids, weights, group, plan, gpu_of(y.device), splits=0)()
