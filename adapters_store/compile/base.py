"""The base's own weights, read from its files: for trained biases and for copies of base layers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.manifest import TensorLocation
from adapters_store.numeric import ITEM_BYTES, Array, F32Array, narrow, numpy_dtype, widen
from adapters_store.tensorfile import TensorEntry, TensorHeader, read_tensor_header

CHUNK_ELEMENTS = 8 << 20


class BaseWeights:
    """Reads tensors of the base, a piece at a time. Headers are kept, files are not held open."""

    def __init__(self) -> None:
        self._headers: dict[str, TensorHeader] = {}

    def shape(self, location: TensorLocation) -> tuple[int, ...]:
        """The shape of a tensor of the base."""
        return self._entry(location).shape

    def float32(self, location: TensorLocation) -> F32Array:
        """A small tensor of the base (a bias) as float32."""
        entry = self._entry(location)
        elements = (entry.end - entry.start) // ITEM_BYTES[entry.dtype]
        return widen(self._read(location, entry, 0, elements), entry.dtype).reshape(entry.shape)

    def equals(self, location: TensorLocation, copy: Array, stored: str) -> bool:
        """Whether `copy`, stored as F32, F16 or BF16, has the base's values cast to that dtype."""
        entry = self._entry(location)
        if entry.shape != copy.shape:
            return False
        flat = copy.reshape(-1)
        for first in range(0, flat.size, CHUNK_ELEMENTS):
            ours = self._read(location, entry, first, min(CHUNK_ELEMENTS, flat.size - first))
            cast = ours if stored == entry.dtype else narrow(widen(ours, entry.dtype), stored)
            if not np.array_equal(cast, flat[first : first + cast.size]):
                return False
        return True

    def _entry(self, location: TensorLocation) -> TensorEntry:
        try:
            if location.file not in self._headers:
                descriptor = os.open(location.file, os.O_RDONLY | os.O_CLOEXEC)
                with os.fdopen(descriptor, "rb", buffering=0):
                    header = read_tensor_header(descriptor, Path(location.file).name)
                self._headers[location.file] = header
            entry = self._headers[location.file].entry(location.key)
            numpy_dtype(entry.dtype)
        except (OSError, AdapterCorrupt, KeyError) as error:
            raise AdapterUnavailable(f"the base's own weight {location.key} can't be read: {error}") from error
        return entry

    def _read(self, location: TensorLocation, entry: TensorEntry, first: int, count: int) -> Array:
        """`count` elements from element `first` on, as stored."""
        size = ITEM_BYTES[entry.dtype]
        offset = self._headers[location.file].data_offset + entry.start + first * size
        with Path(location.file).open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), count * size, offset)
        if len(raw) != count * size:
            raise AdapterUnavailable(f"the base's own weight {location.key} can't be read: its file is too short")
        return np.frombuffer(raw, dtype=numpy_dtype(entry.dtype))
