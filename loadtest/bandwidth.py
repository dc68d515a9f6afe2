"""The machine's limit, taken in the same run as what is compared with it."""

from __future__ import annotations

import time

import torch


def read_bandwidth(buffer_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of a sum over a buffer far larger than any cache, all threads.

    The buffer is read in parts of 32 MiB, each at its best of `repeats`: other work on the machine counts little.
    """
    parts = torch.ones(buffer_bytes // 4, dtype=torch.float32).split(8 << 20)
    best = [float("inf")] * len(parts)
    for _ in range(repeats):
        for i, part in enumerate(parts):
            start = time.perf_counter()
            part.sum()
            best[i] = min(best[i], time.perf_counter() - start)
    return buffer_bytes / sum(best)
