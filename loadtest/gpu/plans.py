"""The plans of a step at fixed addresses, as a captured graph needs them, whatever the backend.

A graph is captured with `plan.segments` or `plan.meta`; `fill` then tells each replay what its step is. Backends
that run in Python alone (on the CPU) are told by the lists themselves.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.types import AttentionMetadata, Segments
from loadtest.gpu.machine import Machine


class SegmentsPlan:
    """Segments of at most `max_rows` rows and `max_members` (row, member) pairs, of ranks up to `max_rank`."""

    def __init__(self, machine: Machine, backend: str, max_rows: int, max_members: int, max_rank: int) -> None:
        self.segments = Segments()
        self._device = None
        if backend in ("triton", "cuda"):
            from kernels.triton.plan import DeviceSegments, bucket_of

            self._device = DeviceSegments(max_rows, max_members, bucket_of(max_rank), machine.device)
            self.segments.scratch["triton"] = self._device

    def fill(self, segments: Segments) -> None:
        """Take on a step's segments, in stream order."""
        if self._device is not None:
            self._device.fill(segments)
        else:
            own = self.segments
            own.starts[:], own.ends[:], own.members[:] = segments.starts, segments.ends, segments.members
            own.scratch.clear()


class AttentionPlan:
    """Decode rows of at most `max_requests` requests of at most `max_blocks` blocks: row i is request i's.

    `meta.slot_mapping` stays where it is too; rows beyond a step's requests write to the dummy block.
    """

    def __init__(self, machine: Machine, backend: str, max_requests: int, max_blocks: int, block_size: int) -> None:
        mapping = torch.zeros(max_requests, dtype=torch.int64, device=machine.device)
        tables = np.zeros((max_requests, max_blocks), dtype=np.int32)
        starts, contexts = list(range(max_requests + 1)), [1] * max_requests
        self.meta = AttentionMetadata(max_requests, starts, contexts, tables, mapping, block_size)
        self._device = None
        if backend in ("triton", "cuda"):
            from kernels.triton.metadata import DeviceAttention

            self._device = DeviceAttention(max_requests, max_blocks, machine.device)
            self.meta.scratch["triton"] = self._device

    def fill(self, meta: AttentionMetadata) -> None:
        """Take on a step's requests, in stream order."""
        own, used = self.meta, len(meta.slot_mapping)
        own.slot_mapping[:used].copy_(meta.slot_mapping, non_blocking=True)
        own.slot_mapping[used:].zero_()
        if self._device is not None:
            self._device.fill(meta)
        else:
            own.num_decodes, own.query_starts, own.context_lens = meta.num_decodes, meta.query_starts, meta.context_lens
            own.block_tables = meta.block_tables
            own.scratch.clear()
