"""Large memory of this process: weights, KV blocks."""

from __future__ import annotations

import mmap

import torch

_HUGE_PAGE = 2 << 20


def lazy_zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, page-aligned, on pages that the system hands out at first touch.

    Where it is large these are huge ones, as far as the system has them: scattered reads would otherwise wait
    for page tables. Private: huge pages for shared memory are a setting of their own, mostly off.
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)
