"""An AttentionMetadata where kernels read it: in device memory, at addresses that stay.

A captured graph replays with the pointers it was captured with, so whoever captures keeps one
DeviceAttention, puts it into `meta.scratch["triton"]` and calls `fill` before each replay, in the stream of
the replay. Steps that do neither get one made for them. Imports no triton.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from kernels.types import AttentionMetadata

SCRATCH_KEY = "triton"
_ALIGNMENT = 32
"""Elements: each array begins at a multiple of 128 bytes, so that every buffer is specialised for alike."""
_NUM_STAGES = 2
"""Host buffers that fills take in turn: one may still be read by a copy in flight."""


class DeviceAttention:
    """The KV geometry of one step of at most `max_requests` requests with at most `max_blocks` blocks each.

    query_starts  int32 [max_requests + 1]; requests beyond the used ones have no rows
    context_lens  int32 [max_requests], 0 beyond the used ones
    table_width   int32 [1]: columns of block_tables in this step
    block_tables  int32 [max_requests * max_blocks]: request i's begins at i * table_width; what lies after
                  the used ones' is left over from earlier steps, and nobody reads it

    All are views of one buffer, so that a fill is one copy, of what the step uses and no more.
    """

    def __init__(self, max_requests: int, max_blocks: int, device: torch.device | str) -> None:
        self.max_requests, self.max_blocks = max_requests, max_blocks
        starts, contexts = _aligned(max_requests + 1), _aligned(max_requests)
        self._parts = (0, starts, starts + contexts, starts + contexts + _ALIGNMENT)
        size = self._parts[3] + max_requests * max_blocks
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self.query_starts = self._buffer[: max_requests + 1]
        self.context_lens = self._buffer[starts : starts + max_requests]
        self.table_width = self._buffer[starts + contexts : starts + contexts + 1]
        self.block_tables = self._buffer[self._parts[3] :]
        self._stages = [_Stage(self._buffer) for _ in range(_NUM_STAGES)]
        self._next = 0

    def fill(self, meta: AttentionMetadata) -> None:
        """Take over what `meta` says, in stream order, without waiting for the device.

        Raises ValueError for more requests or wider tables than there is room for.
        """
        requests, width = meta.block_tables.shape
        if requests > self.max_requests or width > self.max_blocks:
            raise ValueError(
                f"{requests} requests of {width} blocks don't fit {self.max_requests} requests of {self.max_blocks}"
            )
        stage = self._stages[self._next]
        self._next = (self._next + 1) % _NUM_STAGES
        starts, contexts, column, tables = self._parts
        host = stage.host()
        host[starts : starts + requests + 1] = meta.query_starts
        host[starts + requests + 1 : starts + self.max_requests + 1] = meta.query_starts[-1]
        host[contexts : contexts + requests] = meta.context_lens
        host[contexts + requests : contexts + self.max_requests] = 0
        host[column] = width
        host[tables : tables + requests * width].reshape(requests, width)[:] = meta.block_tables
        stage.send(tables + requests * width)


class _Stage:
    """A host buffer on the way to the device: pinned and copied from, or on the CPU the buffer itself."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target
        self._is_direct = target.device.type == "cpu"
        self._source = target if self._is_direct else torch.zeros(len(target), dtype=target.dtype, pin_memory=True)
        self._array = cast(np.ndarray, self._source.numpy())
        self._sent = None if self._is_direct else torch.cuda.Event()

    def host(self) -> np.ndarray:
        """int32 [size], to be written; waits for the copy that last read it (an earlier step's: long done)."""
        if self._sent is not None:
            self._sent.synchronize()  # an event that was never recorded is done
        return self._array

    def send(self, count: int) -> None:
        """Copy the first `count` elements to the device in the current stream."""
        if self._sent is not None:
            self._target[:count].copy_(self._source[:count], non_blocking=True)
            self._sent.record()


def device_attention(meta: AttentionMetadata) -> DeviceAttention:
    """What the owner of `meta` put into its scratch, else one made for this step and kept there."""
    device = meta.scratch.get(SCRATCH_KEY)
    if device is None:
        requests, width = meta.block_tables.shape
        device = meta.scratch[SCRATCH_KEY] = DeviceAttention(requests, width, meta.slot_mapping.device)
        device.fill(meta)
    return cast(DeviceAttention, device)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
