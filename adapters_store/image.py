"""The adapter image: an adapter in the one form that the kernels read, as a safetensors file.

    | length, header JSON, spaces |  data section: a multiple of 4096 bytes into the file               |
                                  |  A | pad | B | pad | bias | pad | A | pad | B | ...   in site order |

A is [padded rank, K], B is [N, padded rank] (an embedding's A is [V, padded rank]), bias is [N], all in the
base's dtype. Ranks are padded with zeros to a multiple of 8, every tensor starts at a multiple of 128 bytes.
The site table is one JSON string in the metadata. Nothing in the file depends on the adapter's name or on
where the image will lie, so the data section is what host and device hold, byte for byte.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash

from adapters_store.errors import AdapterCorrupt
from adapters_store.manifest import BaseManifest
from adapters_store.numeric import ITEM_BYTES, STORED_AS, BaseDtype, numpy_dtype
from adapters_store.tensorfile import LENGTH_BYTES, TensorHeader, read_tensor_header

if TYPE_CHECKING:
    from adapters_store.compile.lora import LoweredSite

RANK_MULTIPLE = 8
TENSOR_ALIGNMENT = 128
DATA_ALIGNMENT = 4096
TABLE_KEY = "multilora.image"


class ImageSite(msgspec.Struct, frozen=True):
    """One row of the site table. Offsets are bytes of the data section, -1 for absent."""

    site: str
    rank: int
    """true rank; 0 with a bias is legal"""
    stride: int
    """padded rank"""
    a_offset: int
    b_offset: int
    bias_offset: int


class ImageTable(msgspec.Struct, frozen=True):
    """What the metadata of an image says."""

    image_key: str
    digest: str
    base_digest: str
    compiler_version: int
    dtype: BaseDtype
    checksum: str
    """of the data section; see checksum_of"""
    sites: tuple[ImageSite, ...]
    warnings: tuple[str, ...] = ()


class ImageHeader(msgspec.Struct, frozen=True):
    """An image's checked header: its table and where its data section lies in the file, in bytes."""

    table: ImageTable
    data_offset: int
    data_bytes: int

    @property
    def sites(self) -> tuple[ImageSite, ...]:
        return self.table.sites

    @property
    def checksum(self) -> str:
        return self.table.checksum

    @property
    def max_rank(self) -> int:
        return max((site.rank for site in self.table.sites), default=0)


class _Piece(msgspec.Struct):
    name: str
    stored: str
    shape: tuple[int, ...]
    offset: int


class _Layout(msgspec.Struct):
    sites: list[ImageSite]
    pieces: list[_Piece]
    """tensors and pads, in the order of their offsets, without holes"""
    data_bytes: int


def checksum_of(data: memoryview) -> str:
    """128 bits of XXH3 over a data section. It finds damage, at the speed of memory, in each load; what an image
    is *of* is its key's business, which is cryptographic."""
    return xxhash.xxh3_128_hexdigest(data)


Checksum = xxhash.xxh3_128
"""checksum_of in parts: update(bytes) in order, then hexdigest()"""


def padded_rank(rank: int) -> int:
    """The rank as stored."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def image_data_bytes(sites: Iterable[LoweredSite], manifest: BaseManifest) -> int:
    """Bytes of the data section an image of these sites has: what the host and the device hold."""
    return _lay_out(sites, STORED_AS[manifest.dtype]).data_bytes


def write_image(
    path: Path,
    sites: list[LoweredSite],
    manifest: BaseManifest,
    *,
    image_key: str,
    digest: str,
    compiler_version: int,
    warnings: tuple[str, ...] = (),
    temporary: str | None = None,
) -> ImageHeader:
    """Write the image of `sites`, in manifest order, to `path`: to a file beside it, `temporary`, then a rename."""
    stored = STORED_AS[manifest.dtype]
    layout = _lay_out(sites, stored)
    data = _fill(layout, sites, stored)
    table = ImageTable(
        image_key=image_key,
        digest=digest,
        base_digest=manifest.digest,
        compiler_version=compiler_version,
        dtype=manifest.dtype,
        checksum=checksum_of(data),
        sites=tuple(layout.sites),
        warnings=warnings,
    )
    header = _encode_header(layout, table)
    unfinished = path.with_name(temporary or f".{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            _write_all(file.fileno(), header)
            _write_all(file.fileno(), data)
        unfinished.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        raise
    return ImageHeader(table, len(header), layout.data_bytes)


def read_header(path: Path) -> ImageHeader:
    """Read and check the header of an image: AdapterCorrupt when it is none, OSError when it can't be read.

    The data section's size is checked, its content is not: whoever reads it verifies the checksum.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0):
        tensors = read_tensor_header(descriptor, path.name)
    try:
        table = msgspec.json.decode(tensors.metadata.get(TABLE_KEY, ""), type=ImageTable)
    except (msgspec.MsgspecError, ValueError) as error:
        raise AdapterCorrupt(f"{path.name} is not an adapter image: {error}") from error
    if tensors.data_offset % DATA_ALIGNMENT:
        raise AdapterCorrupt(f"{path.name} is not an adapter image: its data starts at byte {tensors.data_offset}")
    for site in table.sites:
        _check_site(path.name, site, tensors)
    return ImageHeader(table, tensors.data_offset, tensors.data_bytes)


def _check_site(file: str, site: ImageSite, tensors: TensorHeader) -> None:
    """The table's offsets must be those of the tensors of that name."""
    expected = {
        f"{site.site}.A": site.a_offset,
        f"{site.site}.B": site.b_offset,
        f"{site.site}.bias": site.bias_offset,
    }
    for name, offset in expected.items():
        entry = tensors.entries.get(name)
        start = -1 if entry is None else entry.start
        if start != offset or (offset >= 0 and offset % TENSOR_ALIGNMENT):
            raise AdapterCorrupt(f"{file}: the site table has {name} at byte {offset}, the header at {start}")
    if not 0 <= site.rank <= site.stride or site.stride != padded_rank(site.rank):
        raise AdapterCorrupt(f"{file}: {site.site} has rank {site.rank} in a stride of {site.stride}")


def _lay_out(sites: Iterable[LoweredSite], stored: str) -> _Layout:
    layout = _Layout([], [], 0)
    for lowered in sites:
        name, stride = lowered.site.name, padded_rank(lowered.rank)
        a_offset = b_offset = bias_offset = -1
        if lowered.a is not None and lowered.b is not None:
            is_embedding = lowered.site.kind == "embedding"
            a_shape = (lowered.a.shape[0], stride) if is_embedding else (stride, lowered.a.shape[1])
            a_offset = _append(layout, f"{name}.A", stored, a_shape)
            b_offset = _append(layout, f"{name}.B", stored, (lowered.b.shape[0], stride))
        if lowered.bias is not None:
            bias_offset = _append(layout, f"{name}.bias", stored, lowered.bias.shape)
        layout.sites.append(ImageSite(name, lowered.rank, stride, a_offset, b_offset, bias_offset))
    return layout


def _append(layout: _Layout, name: str, stored: str, shape: tuple[int, ...]) -> int:
    """Add a tensor, and the pad that brings the next one to its boundary; returns the tensor's offset."""
    offset = layout.data_bytes
    layout.pieces.append(_Piece(name, stored, shape, offset))
    end = offset + math.prod(shape) * ITEM_BYTES[stored]
    pad = -end % TENSOR_ALIGNMENT
    if pad:
        layout.pieces.append(_Piece(f"pad.{len(layout.pieces)}", "U8", (pad,), end))
    layout.data_bytes = end + pad
    return offset


def _fill(layout: _Layout, sites: list[LoweredSite], stored: str) -> memoryview:
    """The data section: zeros, with the true ranks written in."""
    data = np.zeros(layout.data_bytes, dtype=np.uint8)
    dtype = numpy_dtype(stored)
    arrays = {
        f"{lowered.site.name}.{part}": array
        for lowered in sites
        for part, array in (("A", lowered.a), ("B", lowered.b), ("bias", lowered.bias))
        if array is not None
    }
    for piece in layout.pieces:
        array = arrays.get(piece.name)
        if array is not None:
            end = piece.offset + math.prod(piece.shape) * dtype.itemsize
            room = data[piece.offset : end].view(dtype).reshape(piece.shape)
            room[tuple(slice(0, extent) for extent in array.shape)] = array
    return data.data


def _encode_header(layout: _Layout, table: ImageTable) -> bytes:
    entries: dict[str, object] = {"__metadata__": {TABLE_KEY: msgspec.json.encode(table).decode()}}
    for piece in layout.pieces:
        end = piece.offset + math.prod(piece.shape) * ITEM_BYTES[piece.stored]
        entries[piece.name] = {
            "dtype": piece.stored,
            "shape": piece.shape,
            "data_offsets": (piece.offset, end),
        }
    text = msgspec.json.encode(entries)
    text += b" " * (-(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
