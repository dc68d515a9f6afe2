"""The machine's limit, taken in the same run as what is compared with it."""

from __future__ import annotations

import ctypes
import time

import torch

from kernels.cpu import library

_PART_BYTES = 32 << 20


def read_bandwidth(buffer_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of plain reads over a buffer far larger than any cache, all threads.

    The buffer is read in parts of 32 MiB, each at its best of `repeats`: other work on the machine counts little.
    The native reader (four streams a thread) is the strictest limit; without native kernels torch sums.
    """
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
    parts = buffer.split(_PART_BYTES // 4)
    best = [float("inf")] * len(parts)
    native = library()
    read = (
        None if native is None else native.function("ml_read", ctypes.c_void_p, ctypes.c_int64, result=ctypes.c_uint64)
    )
    for _ in range(repeats):
        for i, part in enumerate(parts):
            start = time.perf_counter()
            if read is None:
                part.sum()
            else:
                read(part.data_ptr(), part.nbytes)
            best[i] = min(best[i], time.perf_counter() - start)
    return buffer_bytes / sum(best)
