"""From a slot-table entry to views of the arena. Shared by the backends that see tensors and not pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, STRIDE


class Site(NamedTuple):
    """One member's delta at one site, as views of the arena. R is 0 for a site that is only a bias."""

    a: torch.Tensor  # [R, K]; of an embedding [V or more, R]
    b: torch.Tensor  # [N, R]
    bias: torch.Tensor | None  # [N]


def read_site(
    arena: torch.Tensor, entry: Sequence[int], in_features: int, width: int, padded: bool = False
) -> Site | None:
    """The site that a table entry describes; None where it is absent.

    R is the true rank, or the padded one (the padding is zeros, and the views contiguous). `in_features` 0
    reads an embedding, whose A has one row per token: the view goes on to the arena's end, because the
    table doesn't know V. Ids are the caller's to keep below V.
    """
    stride = entry[STRIDE]
    rank = stride if padded and entry[RANK] else entry[RANK]
    bias = _run(arena, entry[BIAS_OFFSET], width) if entry[BIAS_OFFSET] >= 0 else None
    if rank == 0:
        empty = arena[:0]
        a = empty.view(0, in_features) if in_features else empty.view(arena.numel(), 0)
        return None if bias is None else Site(a, empty.view(width, 0), bias)
    start = entry[A_OFFSET]
    if in_features:
        a = _run(arena, start, rank * in_features).view(rank, in_features)
    else:
        a = _run(arena, start, (arena.numel() - start) // stride * stride).view(-1, stride)[:, :rank]
    b = _run(arena, entry[B_OFFSET], width * stride).view(width, stride)[:, :rank]
    return Site(a, b, bias)


def _run(arena: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return arena[start : start + count]
