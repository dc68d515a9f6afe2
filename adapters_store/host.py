"""The host tier: an image's data section in our own memory, read once and verified there."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.image import Checksum, checksum_of
from adapters_store.ref import AdapterRef

Buffer = Any
"""What `allocate` returns: a writable object with the buffer protocol, of exactly the bytes asked for"""


def read_image(ref: AdapterRef, into: Buffer) -> None:
    """Read an image's data section into a buffer of `ref.data_bytes` bytes and verify its checksum there.

    AdapterUnavailable when the file can't be read, AdapterCorrupt when it is not what was compiled. On
    either, the buffer's content is undefined.
    """
    view = memoryview(into).cast("B")
    if len(view) != ref.data_bytes:
        raise ValueError(f"a buffer of {len(view)} bytes for an image of {ref.data_bytes}")
    with open_image(ref) as reader:
        reader.fill(view, 0)
    if checksum_of(view) != ref.checksum:
        raise _differs(ref)


class ImageReader:
    """Reads a data section part by part, for who can't hold it in one piece. Made by `open_image`."""

    def __init__(self, ref: AdapterRef, descriptor: int) -> None:
        self._ref = ref
        self._descriptor = descriptor
        self._sum = Checksum()

    def fill(self, into: Buffer, start: int) -> None:
        """Fill `into` with the bytes from `start` on."""
        view = memoryview(into).cast("B")
        filled = 0
        while filled < len(view):
            count = os.preadv(self._descriptor, [view[filled:]], self._ref.data_offset + start + filled)
            if count == 0:
                raise AdapterCorrupt(f"the image of adapter {self._ref.name} is damaged on disk: it ends early")
            filled += count

    def read(self, into: Buffer, start: int) -> None:
        """As `fill`, for `verify`: the parts in order, without holes."""
        self.fill(into, start)
        self._sum.update(into)

    def verify(self) -> None:
        """Raise AdapterCorrupt unless what was read, all of it, is what was compiled."""
        if self._sum.hexdigest() != self._ref.checksum:
            raise _differs(self._ref)


@contextlib.contextmanager
def open_image(ref: AdapterRef) -> Iterator[ImageReader]:
    """A reader of an image whose file has the right size; errors as in `read_image`, also of what is read in here."""
    try:
        descriptor = os.open(ref.image_path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0):
            if os.fstat(descriptor).st_size != ref.data_offset + ref.data_bytes:
                raise AdapterCorrupt(f"the image of adapter {ref.name} is damaged on disk: its size differs")
            yield ImageReader(ref, descriptor)
    except OSError as error:
        raise AdapterUnavailable(f"the image of adapter {ref.name} can't be read: {error.strerror}") from error


def _differs(ref: AdapterRef) -> AdapterCorrupt:
    return AdapterCorrupt(f"the image of adapter {ref.name} is damaged on disk: its checksum differs")


def allocate_pageable(num_bytes: int) -> Buffer:
    """Plain memory; the device's owner may prefer pinned."""
    return np.empty(num_bytes, dtype=np.uint8)


class HostCache:
    """Images in host memory under a byte budget, least recently used out first. Thread-safe.

    A buffer stays valid for who holds it, also after it has left the cache; it must not be written to.
    """

    def __init__(self, budget_bytes: int, allocate: Callable[[int], Buffer] = allocate_pageable) -> None:
        self._budget_bytes = budget_bytes
        self._allocate = allocate
        self._lock = threading.Lock()
        self._buffers: OrderedDict[str, tuple[Buffer, int]] = OrderedDict()
        self._reading: dict[str, Future[Buffer]] = {}
        self._changes: list[tuple[str, bool]] = []
        self.bytes_used = 0
        self.hits = 0
        self.reads = 0
        self.evictions = 0

    def get(self, ref: AdapterRef) -> Buffer:
        """The data section of an image, from memory or by one read that all who ask meanwhile share.

        Raises what `read_image` raises; a failure is not remembered.
        """
        with self._lock:
            held = self._buffers.get(ref.image_key)
            if held is not None:
                self._buffers.move_to_end(ref.image_key)
                self.hits += 1
                return held[0]
            shared = self._reading.get(ref.image_key)
            mine: Future[Buffer] = Future()
            if shared is None:
                self._reading[ref.image_key] = mine
        return self._read(ref, mine) if shared is None else shared.result()

    def drop(self, image_key: str) -> None:
        """Forget an image."""
        with self._lock:
            held = self._buffers.pop(image_key, None)
            if held is not None:
                self.bytes_used -= held[1]
                self._changes.append((image_key, False))

    def take_changes(self) -> list[tuple[str, bool]]:
        """(image key, whether it is held) of each image that came or left since the last call, in order."""
        with self._lock:
            changes, self._changes = self._changes, []
        return changes

    @property
    def num_images(self) -> int:
        """Images held."""
        return len(self._buffers)

    def __contains__(self, image_key: str) -> bool:
        return image_key in self._buffers

    def _read(self, ref: AdapterRef, mine: Future[Buffer]) -> Buffer:
        try:
            buffer = self._allocate(ref.data_bytes)
            read_image(ref, buffer)
        except BaseException as error:
            with self._lock:
                del self._reading[ref.image_key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[ref.image_key]
            self.reads += 1
            self._keep(ref, buffer)
        mine.set_result(buffer)
        return buffer

    def _keep(self, ref: AdapterRef, buffer: Buffer) -> None:
        if ref.data_bytes > self._budget_bytes:
            return
        while self.bytes_used + ref.data_bytes > self._budget_bytes:
            image_key, (_, num_bytes) = self._buffers.popitem(last=False)
            self.bytes_used -= num_bytes
            self.evictions += 1
            self._changes.append((image_key, False))
        self._buffers[ref.image_key] = (buffer, ref.data_bytes)
        self.bytes_used += ref.data_bytes
        self._changes.append((ref.image_key, True))
