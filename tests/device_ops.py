"""A kernel backend as a device's is: each op is one opaque operation on tensors, and reads its plans from them alone.

The work is done by kernels.torch_backend, over plans that are decoded from the device forms at each call. So what was
not put into them is not seen, in eager steps as in replays.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from kernels import torch_backend
from kernels.torch_backend import write_kv
from kernels.triton.metadata import device_attention
from kernels.triton.plan import OTHERS, OTHERS_END, ROWS, SLOT, START, WEIGHT, device_segments
from kernels.types import RANK, AttentionMetadata, Segments, SiteGroup, SlotWeights

__all__ = ["paged_attention", "segmented_embedding", "segmented_lora", "write_kv"]


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    plan = device_segments(segments, weights, len(y))
    geometry = (list(group.rows), list(group.offsets), list(group.widths), group.in_features)
    _lora(y, x, weights.arena, weights.table, plan.records, plan.rank_bucket, *geometry)


def segmented_embedding(y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments) -> None:
    plan = device_segments(segments, weights, len(y))
    _embedding(y, ids, weights.arena, weights.table, plan.records, plan.rank_bucket, row)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    device = device_attention(meta)
    plan = (device.query_starts, device.context_lens, device.table_width, device.block_tables)
    return _attention(q, k_cache, v_cache, *plan, meta.block_size, scale, sliding_window, softcap, sinks)


@torch.library.custom_op("device_ops::lora", mutates_args=("y",))
def _lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    records: torch.Tensor,
    bucket: int,
    rows: list[int],
    offsets: list[int],
    widths: list[int],
    in_features: int,
) -> None:
    group = SiteGroup(tuple(rows), tuple(offsets), tuple(widths), in_features)
    torch_backend.segmented_lora(y, x, cut(arena, table, bucket), group, decoded(records))


@torch.library.custom_op("device_ops::embedding", mutates_args=("y",))
def _embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    records: torch.Tensor,
    bucket: int,
    row: int,
) -> None:
    torch_backend.segmented_embedding(y, ids, cut(arena, table, bucket), row, decoded(records))


@torch.library.custom_op("device_ops::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    table_width: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    starts = query_starts.tolist()
    requests = next((i for i, (a, b) in enumerate(pairwise(starts)) if a == b), len(starts) - 1)
    width = int(table_width)
    tables = block_tables[: requests * width].view(requests, width).numpy().copy()
    counts = np.diff(starts[: requests + 1])
    meta = AttentionMetadata(
        num_decodes=int(np.argmax(counts != 1)) if (counts != 1).any() else requests,
        query_starts=starts[: requests + 1],
        context_lens=context_lens[:requests].tolist(),
        block_tables=tables,
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        block_size=block_size,
    )
    return torch_backend.paged_attention(
        q, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def decoded(records: torch.Tensor) -> Segments:
    """The segments that a DeviceSegments' records stand for, one a tile."""
    segments = Segments()
    tiles = int(records[0, 0])
    weights = records.view(torch.float32)[:, WEIGHT].tolist()
    lines = records.tolist()
    for number in range(1, 1 + tiles):
        line = lines[number]
        entries = [number, *range(line[OTHERS], line[OTHERS_END])]
        segments.starts.append(line[START])
        segments.ends.append(line[START] + line[ROWS])
        segments.members.append(tuple((lines[entry][SLOT], weights[entry]) for entry in entries))
    return segments


def cut(arena: torch.Tensor, table: torch.Tensor, bucket: int) -> SlotWeights:
    """The kernels' grids end at the bucket: here a site whose rank is above it gives nothing at all."""
    used = SlotWeights(arena, table.clone())
    used.table[..., RANK].masked_fill_(used.table[..., RANK] > bucket, 0)
    return used
