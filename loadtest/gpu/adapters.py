"""Adapters made on the device: an arena with NaN wherever no tensor is, its table, and copies apart from both.

Oracles take the copies, never the table: an offset that is wrong in the table or read wrongly shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, STRIDE, TABLE_COLUMNS, Segments, SiteGroup, SlotWeights

ALIGNMENT_BYTES = 128  # of an image's tensors
RANK_PADDING = 8
_TAIL = 999  # elements of NaN behind the last tensor
_SCRAP = 0xFF  # a byte; four, two or eight of them are NaN in every floating dtype

Members = tuple[tuple[int, float], ...]
"""(slot, weight) of each adapter of a row; () is the base"""


@dataclass(frozen=True, slots=True)
class SiteShape:
    """What a slot has at a site."""

    width: int  # N
    in_features: int  # K
    rank: int  # 0: only a bias
    has_bias: bool = False
    vocab: int = 0  # of an embedding, whose A is [vocab, rank]

    @property
    def padded(self) -> int:
        return -(-self.rank // RANK_PADDING) * RANK_PADDING

    def elements(self) -> tuple[int, int, int]:
        """Of A, of B, of the bias."""
        return (self.vocab or self.in_features) * self.padded, self.width * self.padded, self.width * self.has_bias


@dataclass(frozen=True, slots=True)
class Delta:
    """What was put at a site, unpadded."""

    a: torch.Tensor  # [r, K]; of an embedding [V, r]
    b: torch.Tensor  # [N, r]
    bias: torch.Tensor | None  # [N]


@dataclass(slots=True)
class Adapters:
    """What kernels read, and the copies."""

    weights: SlotWeights
    deltas: dict[tuple[int, int], Delta]  # (slot, table row); empty where none were kept


def group_sites(group: SiteGroup, ranks: Sequence[int]) -> dict[tuple[int, int], SiteShape]:
    """All slices of a projection for slots 1, 2, ... of these ranks."""
    return {
        (slot, row): SiteShape(width, group.in_features, rank)
        for slot, rank in enumerate(ranks, 1)
        for row, width in zip(group.rows, group.widths, strict=True)
    }


def make_adapters(
    sites: Mapping[tuple[int, int], SiteShape],
    num_slots: int,
    num_rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    keep: bool = True,
) -> Adapters:
    """Random adapters, with tensors aligned and a NaN gap after each. `keep` copies them for an oracle."""
    align = ALIGNMENT_BYTES // dtype.itemsize
    table = torch.zeros(num_slots, num_rows, TABLE_COLUMNS, dtype=torch.int64)
    table[:, :, BIAS_OFFSET] = -1
    used = align
    for place, shape in sites.items():
        starts = []
        for count in shape.elements():
            starts.append(used if count else -1)
            used += (-(-count // align) + 1) * align if count else 0
        a, b, bias = starts
        table[place] = torch.tensor([max(a, 0), max(b, 0), bias, shape.rank, shape.padded])
    device = generator.device
    arena = torch.full(((used + _TAIL) * dtype.itemsize,), _SCRAP, dtype=torch.uint8, device=device).view(dtype)
    deltas = {}
    for (slot, row), shape in sites.items():
        delta = _put(arena, table[slot, row].tolist(), shape, generator)
        if keep:
            deltas[slot, row] = delta
    return Adapters(SlotWeights(arena, table.to(device)), deltas)


def _put(arena: torch.Tensor, entry: Sequence[int], shape: SiteShape, generator: torch.Generator) -> Delta:
    """Write a site's tensors; results at inputs of size one are of size one."""

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        drawn = torch.randn(rows, columns, device=arena.device, generator=generator)
        return drawn.mul_(scale).to(arena.dtype)

    rank, stride = entry[RANK], entry[STRIDE]
    b = draw(shape.width, rank, max(rank, 1) ** -0.5)
    bias = draw(1, shape.width, 1.0)[0] if shape.has_bias else None
    if shape.vocab:
        a = draw(shape.vocab, rank, 1.0)
        _pad(arena, entry[A_OFFSET], a, stride)
    else:
        a = draw(rank, shape.in_features, shape.in_features**-0.5)
        arena[entry[A_OFFSET] :][: stride * shape.in_features].zero_()
        arena[entry[A_OFFSET] :][: a.numel()].copy_(a.flatten())
    _pad(arena, entry[B_OFFSET], b, stride)
    if bias is not None:
        arena[entry[BIAS_OFFSET] :][: shape.width].copy_(bias)
    return Delta(a, b, bias)


def _pad(arena: torch.Tensor, start: int, rows: torch.Tensor, stride: int) -> None:
    """`rows` at `start`, each followed by zeros up to `stride` elements."""
    place = arena[start : start + len(rows) * stride].view(len(rows), stride)
    place.zero_()
    place[:, : rows.shape[1]].copy_(rows)


def segments_of(members: Iterable[Members]) -> Segments:
    """Runs of equal members among a batch's rows."""
    segments, last, row = Segments(), None, 0
    for row, own in enumerate(members, 1):
        if own and own == last:
            segments.ends[-1] = row
        elif own:
            segments.starts.append(row - 1)
            segments.ends.append(row)
            segments.members.append(own)
        last = own
    return segments


def spread(rows: int, distinct: int) -> list[Members]:
    """`rows` of the slots 1 to `distinct`, as many of each as can be, in order."""
    return [((row * distinct // rows + 1, 1.0),) for row in range(rows)]
