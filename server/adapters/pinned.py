"""The host tier's memory where a device copies from it by itself: pinned once, at start, and handed out in pieces."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.host import Buffer, allocate_pageable
from server.adapters.regions import Regions, region_bytes


class PinnedPool:
    """Buffers by first fit. One is free again when nobody refers to it any more.

    Pinning memory makes the device wait, so nothing is pinned later: when no range is large enough (the budget is in
    use by images that have left the cache and are still being copied, or in pieces) a buffer is plain memory, which
    takes the slower way.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        """`memory`: uint8, pinned."""
        self._array: npt.NDArray[np.uint8] = memory.numpy()
        self._regions = Regions(len(self._array))
        self._freed: deque[int] = deque()  # appended to by whoever lets go of a buffer, in any thread
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int) -> Buffer:
        """uint8 [num_bytes]"""
        with self._lock:
            while self._freed:
                self._regions.free(self._freed.popleft())
            size = region_bytes(num_bytes)
            offset = self._regions.find(size)
            if offset is None:
                return allocate_pageable(num_bytes)
            self._regions.take(offset, size)
        buffer = np.frombuffer(self._array[offset : offset + num_bytes], dtype=np.uint8)  # refers to no other array
        weakref.finalize(buffer, self._freed.append, offset)
        return buffer
