"""The machine's limit, taken in the same run as what is compared with it."""

from __future__ import annotations

import time

import torch


def read_bandwidth(buffer_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of a sum over a buffer far larger than any cache, all threads; best of `repeats`."""
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer_bytes / best
