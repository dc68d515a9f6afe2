"""The arena's bytes and the slot table, in host memory or on a device: how images come in and rows are written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.host import Buffer, open_image, read_image
from adapters_store.ref import AdapterRef
from kernels.memory import lazy_zeros
from kernels.types import BIAS_OFFSET, RANK, TABLE_COLUMNS, SlotWeights
from server.adapters.ahead import TouchAhead
from server.adapters.regions import ALIGNMENT
from server.adapters.streams import Event, Streams

STAGING_BYTES = 8 << 20  # of each of the two buffers that images pass through on their way to a device
SCRATCH_BYTES = 32 << 20  # that an image passes through when it is moved onto itself

Rows = npt.NDArray[np.int64]
"""Table rows [site rows, 5]: A offset, B offset, bias offset, rank, stride (kernels/types.py)"""


def absent_rows(num_rows: int) -> Rows:
    """Table rows of a slot without any site: rank 0 and no bias."""
    rows = np.zeros((num_rows, TABLE_COLUMNS), dtype=np.int64)
    rows[:, BIAS_OFFSET] = -1
    return rows


class ArenaMemory(Protocol):
    """`weights` is what the kernels read; its tensors never change address. Offsets and sizes are bytes.

    `read` and `write` run on the loader thread, on a region that is free of anything else until they return;
    then the bytes are there for every step dispatched from now on. All else is the engine thread's.
    """

    weights: SlotWeights

    def fence(self) -> Event | None:
        """What a load that is asked for now has to wait for before it writes to its region."""

    def read(self, ref: AdapterRef, offset: int, fence: Event | None) -> None:
        """Read an image from disk into its region and verify it; errors as `read_image`'s."""

    def write(self, image: Buffer, offset: int, fence: Event | None) -> None:
        """Copy an image that is in host memory, verified, into its region."""

    def move(self, old_offset: int, new_offset: int, num_bytes: int) -> None:
        """Move bytes; the ranges may overlap."""

    def write_rows(self, slot: int, rows: Rows) -> None:
        """Replace a slot's rows of the table, behind every step dispatched so far and before every later one."""

    def close(self) -> None: ...


class HostMemory:
    """The CPU's: reserved at once, touched a little ahead of the images that come; steps are synchronous."""

    def __init__(self, arena_bytes: int, table: npt.NDArray[np.int64], dtype: torch.dtype) -> None:
        self._bytes = _aligned_zeros(arena_bytes)
        arena = torch.from_numpy(self._bytes).view(dtype)  # [elements]
        self.weights = SlotWeights(arena, torch.from_numpy(table), slot_ranks=np.zeros(len(table), np.int64))
        self._ahead = TouchAhead(self._bytes)

    def fence(self) -> None:
        return None

    def read(self, ref: AdapterRef, offset: int, fence: Event | None) -> None:
        read_image(ref, self._bytes[offset : offset + ref.data_bytes])
        self._ahead.use(offset + ref.data_bytes)

    def write(self, image: Buffer, offset: int, fence: Event | None) -> None:
        source = np.frombuffer(image, dtype=np.uint8)
        self._bytes[offset : offset + len(source)] = source
        self._ahead.use(offset + len(source))

    def move(self, old_offset: int, new_offset: int, num_bytes: int) -> None:
        base = self._bytes.ctypes.data
        ctypes.memmove(base + new_offset, base + old_offset, num_bytes)

    def write_rows(self, slot: int, rows: Rows) -> None:
        self.weights.table[slot].copy_(torch.from_numpy(rows))
        _note(self.weights, slot, rows)

    def close(self) -> None:
        self._ahead.close()


class DeviceMemory:
    """A device's: images come beside the steps, through two pinned buffers unless they are in pinned memory already;
    all else goes in the steps' stream.

    A load waits for what was dispatched when it was asked for. By the slots' books nothing of that reads its region
    (refs go when their last step is collected), but a move may still read or write there. The loader returns when
    the copies have ended, after a failure too: then the region is free again.
    """

    def __init__(
        self,
        arena_bytes: int,
        table: npt.NDArray[np.int64],
        dtype: torch.dtype,
        device: torch.device,
        streams: Streams,
    ) -> None:
        num_bytes = arena_bytes // ALIGNMENT * ALIGNMENT
        self._streams = streams
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(min(SCRATCH_BYTES, num_bytes), dtype=torch.uint8, device=device)
        self._staging = [_Staging(streams.pinned(STAGING_BYTES)) for _ in range(2)]
        device_table = torch.from_numpy(table).to(device)
        self.weights = SlotWeights(self._bytes.view(dtype), device_table, slot_ranks=np.zeros(len(table), np.int64))

    def fence(self) -> Event:
        return self._streams.mark()

    def read(self, ref: AdapterRef, offset: int, fence: Event | None) -> None:
        with open_image(ref) as reader:
            self._send(offset, ref.data_bytes, reader.read, fence)
            reader.verify()

    def write(self, image: Buffer, offset: int, fence: Event | None) -> None:
        source = np.frombuffer(image, dtype=np.uint8)
        pinned = torch.from_numpy(source) if source.flags.writeable else None
        if pinned is not None and self._streams.is_pinned(pinned):
            assert fence is not None, "a load waits for what came before it"
            self._streams.copy_beside(self._bytes[offset : offset + len(source)], pinned, fence).synchronize()
            return

        def fill(part: npt.NDArray[np.uint8], start: int) -> None:
            part[:] = source[start : start + len(part)]

        self._send(offset, len(source), fill, fence)

    def move(self, old_offset: int, new_offset: int, num_bytes: int) -> None:
        old, new = (self._bytes[start : start + num_bytes] for start in (old_offset, new_offset))
        if abs(new_offset - old_offset) >= num_bytes:
            self._streams.copy(new, old)
            return
        starts = range(0, num_bytes, len(self._scratch))
        for start in starts if new_offset < old_offset else reversed(starts):  # no byte is written before it was read
            part = slice(start, min(start + len(self._scratch), num_bytes))
            scratch = self._scratch[: part.stop - part.start]
            self._streams.copy(scratch, old[part])
            self._streams.copy(new[part], scratch)

    def write_rows(self, slot: int, rows: Rows) -> None:
        self._streams.upload(self.weights.table[slot], rows)
        _note(self.weights, slot, rows)

    def close(self) -> None:
        """Nothing to stop."""

    def _send(
        self, offset: int, num_bytes: int, fill: Callable[[npt.NDArray[np.uint8], int], None], fence: Event | None
    ) -> None:
        """`fill` puts the bytes from a start on into a part; one part is filled while the other is copied."""
        assert fence is not None, "a load waits for what came before it"
        end: Event | None = None
        try:
            for number, start in enumerate(range(0, num_bytes, self._staging[0].num_bytes)):
                staging = self._staging[number % 2]
                part = staging.part(num_bytes - start)
                fill(part.numpy(), start)
                target = self._bytes[offset + start : offset + start + len(part)]
                end = staging.end = self._streams.copy_beside(target, part, fence)
        finally:
            if end is not None:
                end.synchronize()


class _Staging:
    """A pinned buffer and the end of the last copy out of it."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self.num_bytes = len(buffer)
        self.end: Event | None = None

    def part(self, num_bytes: int) -> torch.Tensor:
        """Up to `num_bytes` of it, when nothing reads them any more."""
        if self.end is not None:
            self.end.synchronize()
        return self._buffer[: min(num_bytes, self.num_bytes)]


def _note(weights: SlotWeights, slot: int, rows: Rows) -> None:
    assert weights.slot_ranks is not None
    weights.slot_ranks[slot] = rows[:, RANK].max(initial=0)
    weights.version += 1


def _aligned_zeros(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes at an address that is a multiple of ALIGNMENT; pages come as they are touched."""
    memory: npt.NDArray[np.uint8] = lazy_zeros(nbytes // ALIGNMENT * ALIGNMENT + ALIGNMENT).numpy()
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes // ALIGNMENT * ALIGNMENT]
