"""A short proof that the library computes what it should on this very device, before anybody is answered with it.

It also loads every variant of the kernel, which must not happen first while a graph is captured.
"""

from __future__ import annotations

import itertools

import torch

from kernels.cuda.lora import Lora
from kernels.types import Segments, SiteGroup, SlotWeights

_RANKS = {16: (16, 5), 64: (64, 24)}  # largest rank -> those of slots 1 and 2
_ROWS, _IN_FEATURES, _WIDTHS = 21, 480, (320, 96)
_TOLERANCE = 0.01  # of the largest value: bf16 rounds at 0.004, a wrong tile is off by all there is


def is_right(lora: Lora, device: torch.device) -> bool:
    """Whether a step of two adapters and base rows comes out right, in every variant and twice the same."""
    return all(
        _computes(lora, device, dtype, ranks, padding)
        for dtype, ranks, padding in itertools.product((torch.bfloat16, torch.float16), _RANKS.values(), (0, 1))
    )


def _computes(lora: Lora, device: torch.device, dtype: torch.dtype, ranks: tuple[int, int], padding: int) -> bool:
    """`padding`: columns of y behind the last slice, which make its rows unaligned."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    group = SiteGroup((0, 1), (0, _WIDTHS[0]), _WIDTHS, _IN_FEATURES)
    parts, used, products = [], 0, {}
    table = torch.zeros(3, 2, 5, dtype=torch.int64)
    table[:, :, 2] = -1
    for slot, rank in enumerate(ranks, 1):
        for row, width in enumerate(_WIDTHS):
            padded = -(-rank // 8) * 8
            a, b = normal(padded, _IN_FEATURES) * _IN_FEATURES**-0.5, normal(width, padded) * rank**-0.5
            a[rank:], b[:, rank:] = 0.0, 0.0
            products[slot, row] = b.double() @ a.double()
            offsets = used, used + a.numel()
            table[slot, row] = torch.tensor((*offsets, -1, rank, padded))
            parts += [a.flatten(), b.flatten()]
            used += a.numel() + b.numel()
    weights = SlotWeights(torch.cat(parts).to(device), table.to(device))
    weights.slot_ranks = table[:, :, 3].amax(1).numpy()
    segments = Segments([0, 1, 19], [1, 18, _ROWS], [((1, 1.0),), ((2, 0.5),), ((1, 1.0),)])
    x, y = normal(_ROWS, _IN_FEATURES), normal(_ROWS, sum(_WIDTHS) + padding)
    right = y.double()
    for start, end, ((slot, weight),) in zip(segments.starts, segments.ends, segments.members, strict=True):
        for row, (offset, width) in enumerate(zip(group.offsets, group.widths, strict=True)):
            delta = weight * (x[start:end].double() @ products[slot, row].T)
            right[start:end, offset : offset + width] += delta
    first, second = (y.to(device, copy=True) for _ in range(2))
    for out in (first, second):
        lora.segmented_lora(out, x.to(device), weights, group, segments)
    got = first.cpu()
    is_close = bool((got.double() - right).abs().max() <= _TOLERANCE * right.abs().max())
    return is_close and torch.equal(got[18], y[18]) and torch.equal(got, second.cpu())
