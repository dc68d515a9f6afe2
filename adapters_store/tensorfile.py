"""A strict reader of safetensors. Whatever bytes it is given, it returns or raises an AdapterError.

    | 8 bytes: header length, little endian | header: JSON | data section |

Every tensor must have a known dtype, as many bytes as its shape says, and its own range; together the
ranges must cover the data section without a gap or an overlap.
"""

from __future__ import annotations

import math
import os
from typing import Annotated

import msgspec
import numpy as np

from adapters_store.errors import AdapterCorrupt, AdapterUnsupported
from adapters_store.numeric import ITEM_BYTES, Array, F32Array, numpy_dtype, widen

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 16
LENGTH_BYTES = 8

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _RawEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a header; start and end are bytes of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorHeader(msgspec.Struct, frozen=True):
    """A checked header. `data_offset` is where the data section starts in the file, in bytes."""

    file: str
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_offset: int
    data_bytes: int

    def entry(self, name: str) -> TensorEntry:
        """The entry of `name`; AdapterCorrupt when there is none."""
        try:
            return self.entries[name]
        except KeyError:
            raise AdapterCorrupt(f"{self.file} has no tensor {shown(name)}") from None


def shown(name: str) -> str:
    """A name from an untrusted file as it may stand in a message: quoted, escaped, bounded."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:160]}…{text[-36:]}"


def header_length(file: str, prefix: bytes, file_bytes: int) -> int:
    """The header's length from the first 8 bytes of a file of `file_bytes` bytes."""
    if len(prefix) < LENGTH_BYTES:
        raise AdapterCorrupt(f"{file} is truncated: {file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterCorrupt(
            f"{file} is no safetensors file: its header would take {length} bytes (limit {MAX_HEADER_BYTES})"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise AdapterCorrupt(f"{file} is truncated: the header takes {length} bytes, the file has {file_bytes}")
    return length


def parse_header(file: str, text: bytes | memoryview, data_bytes: int) -> TensorHeader:
    """Check the header `text` of a file whose data section has `data_bytes` bytes."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        raise AdapterCorrupt(f"{file} has no valid safetensors header: {error}") from error
    entries = {name: _entry(file, name, value) for name, value in raw.items()}
    _check_ranges(file, list(entries.values()), data_bytes)
    return TensorHeader(file, entries, metadata, LENGTH_BYTES + len(text), data_bytes)


def _entry(file: str, name: str, value: msgspec.Raw) -> TensorEntry:
    try:
        raw = msgspec.json.decode(value, type=_RawEntry)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        raise AdapterCorrupt(f"{file}: the header of tensor {shown(name)} is invalid: {error}") from error
    if raw.dtype not in ITEM_BYTES:
        raise AdapterCorrupt(f"{file}: tensor {shown(name)} has the unknown dtype {shown(raw.dtype)}")
    if len(raw.shape) > MAX_DIMS:
        raise AdapterCorrupt(f"{file}: tensor {shown(name)} has {len(raw.shape)} dimensions")
    start, end = raw.data_offsets
    need = math.prod(raw.shape) * ITEM_BYTES[raw.dtype]
    if end - start != need:
        raise AdapterCorrupt(
            f"{file}: tensor {shown(name)} of shape {raw.shape} and dtype {raw.dtype} needs {need} bytes, "
            f"its range has {end - start}"
        )
    return TensorEntry(name, raw.dtype, tuple(raw.shape), start, end)


def _check_ranges(file: str, entries: list[TensorEntry], data_bytes: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise AdapterCorrupt(f"{file}: tensor {shown(entry.name)} {what} (byte {entry.start})")
        if entry.end > data_bytes:
            raise AdapterCorrupt(
                f"{file} is truncated: tensor {shown(entry.name)} ends at byte {entry.end} "
                f"of a data section of {data_bytes}"
            )
        position = entry.end
    if position != data_bytes:
        raise AdapterCorrupt(f"{file} has {data_bytes - position} bytes after its last tensor")


def read_tensor_header(descriptor: int, file: str) -> TensorHeader:
    """The checked header of the open file `descriptor`; reads the header only."""
    file_bytes = os.fstat(descriptor).st_size
    length = header_length(file, os.pread(descriptor, LENGTH_BYTES, 0), file_bytes)
    text = os.pread(descriptor, length, LENGTH_BYTES)
    if len(text) != length:
        raise AdapterCorrupt(f"{file} is truncated: its header ends early")
    return parse_header(file, text, file_bytes - LENGTH_BYTES - length)


class TensorFile:
    """A safetensors file held in memory."""

    def __init__(self, file: str, content: bytes | memoryview) -> None:
        view = memoryview(content)
        length = header_length(file, bytes(view[:LENGTH_BYTES]), len(view))
        start = LENGTH_BYTES + length
        self.header = parse_header(file, view[LENGTH_BYTES:start], len(view) - start)
        self._data = view[start:]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return self.header.entries

    def array(self, name: str) -> Array:
        """A view of the tensor as stored (bfloat16 as uint16); AdapterUnsupported but for F32, F16, BF16."""
        entry = self.header.entry(name)
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise AdapterUnsupported(
                f"{self.header.file}: tensor {shown(name)} has dtype {entry.dtype}; "
                "adapters in F32, F16 or BF16 are served"
            )
        flat = np.frombuffer(self._data[entry.start : entry.end], dtype=numpy_dtype(entry.dtype))
        return flat.reshape(entry.shape)

    def float32(self, name: str) -> F32Array:
        """The tensor widened to float32."""
        return widen(self.array(name), self.header.entry(name).dtype)
