"""Other ways to add adapters, over the same tensors: what ours is held against.

cuBLAS      two products for one adapter: all slices' A stacked, then either all slices' B as one block diagonal
            matrix or one product a slice; the faster of both is the contestant
gather      each row's A and B gathered into a batch of small products
others'     see peers.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.types import SiteGroup
from loadtest.gpu.adapters import Adapters

MAX_GATHER_BYTES = 1 << 30


@dataclass
class Stacks:
    """One set's adapters as dense stacks, ranks padded to the largest with zeros, for those that need them so."""

    a: list[torch.Tensor]  # per slice [adapters, R, K]
    b: list[torch.Tensor]  # per slice [adapters, N, R]
    ranks: list[int]  # true, by adapter
    owners: list[int]  # adapter of each row, ascending
    offsets: list[int]  # of the slices in y, and their end

    @property
    def max_rank(self) -> int:
        return self.a[0].shape[1]


def stacks_of(adapters: Adapters, group: SiteGroup, ranks: Sequence[int], owners: Sequence[int]) -> Stacks:
    """From the copies of slots 1, 2, ..."""
    most = max(ranks)
    a, b = [], []
    for row, width in zip(group.rows, group.widths, strict=True):
        deltas = [adapters.deltas[slot, row] for slot in range(1, len(ranks) + 1)]
        a.append(deltas[0].a.new_zeros(len(ranks), most, group.in_features))
        b.append(deltas[0].b.new_zeros(len(ranks), width, most))
        for index, delta in enumerate(deltas):
            a[-1][index, : len(delta.a)] = delta.a
            b[-1][index, :, : len(delta.a)] = delta.b
    return Stacks(a, b, list(ranks), list(owners), [*group.offsets, group.offsets[-1] + group.widths[-1]])


def cublas_by_slice(stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """One shrink, an expand for each slice."""
    down, rank = torch.cat([a[0] for a in stacks.a]).T, stacks.max_rank
    ups = [b[0].T for b in stacks.b]
    parts = [y[:, start:end] for start, end in zip(stacks.offsets, stacks.offsets[1:], strict=False)]

    def run() -> None:
        v = x @ down
        for number, (part, up) in enumerate(zip(parts, ups, strict=True)):
            part.addmm_(v[:, number * rank : (number + 1) * rank], up)

    return run


def cublas_block_diagonal(stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """One shrink, one expand."""
    down = torch.cat([a[0] for a in stacks.a]).T
    up = torch.block_diag(*(b[0] for b in stacks.b)).contiguous().T
    return lambda: y.addmm_(x @ down, up)


def gather(stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object] | None:
    """Batched products of gathered matrices; None where the gathered ones would be too much."""
    largest = max(t[0].numel() for t in (*stacks.a, *stacks.b)) * x.itemsize
    if largest * len(x) > MAX_GATHER_BYTES:
        return None
    owners = torch.tensor(stacks.owners, device=x.device)
    parts = [y[:, start:end] for start, end in zip(stacks.offsets, stacks.offsets[1:], strict=False)]

    def run() -> None:
        for part, a, b in zip(parts, stacks.a, stacks.b, strict=True):
            v = torch.bmm(a[owners], x[:, :, None])
            part.add_(torch.bmm(b[owners], v)[:, :, 0])

    return run
