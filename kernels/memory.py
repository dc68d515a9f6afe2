"""Large memory of this process: weights, KV blocks."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since Linux 5.14


def lazy_zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, page-aligned, on pages that the system hands out at first touch.

    Where it is large these are huge ones, as far as the system has them: scattered reads would otherwise wait
    for page tables. Private: huge pages for shared memory are a setting of their own, mostly off.
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


def populate(address: int, num_bytes: int) -> bool:
    """Bring the pages of a range into memory; its contents stay. `address` is page-aligned.

    False where the system can't: then they come at first touch.
    """
    if sys.platform != "linux":
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return bool(madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0)
