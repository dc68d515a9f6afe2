"""segmented_lora and segmented_embedding in native code (csrc/lora.h), for bf16; other dtypes go to torch.

What a call needs beside x and y is made once and kept: the segments as flat arrays in `Segments.scratch`
(once per step), the sites' geometry and the memory between the two phases in `SlotWeights.scratch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from kernels import torch_backend
from kernels.native_library import Library
from kernels.types import STRIDE, Segments, SiteGroup, SlotWeights

_ALIGNMENT = 64  # of the scratch memory, bytes
_STATUS = {1: "its scratch memory is too small", 2: "a padded rank is no multiple of 8, or below the rank"}


class LoraSegments(ctypes.Structure):
    """csrc/lora.h's LoraSegments; keeps what it points to."""

    _fields_ = [
        *((name, POINTER(c_int32)) for name in ("starts", "ends", "members", "slots")),
        ("weights", POINTER(c_float)),
        ("count", c_int64),
    ]


class LoraGroup(ctypes.Structure):
    """csrc/lora.h's LoraGroup; keeps what it points to."""

    _fields_ = [
        *((name, POINTER(c_int32)) for name in ("rows", "offsets", "widths")),
        *((name, c_int64) for name in ("slices", "in_features")),
    ]


class _LoraArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("arena", "table")),
        ("table_rows", c_int64),
        *((name, c_void_p) for name in ("group", "segments", "x", "ids", "y")),
        *((name, c_int64) for name in ("x_stride", "y_stride")),
        ("scratch", c_void_p),
        ("scratch_elements", c_int64),
    ]


@dataclass(slots=True)
class FlatSegments:
    """The segments of a step as C reads them, and what they were made from (batches reuse their lists)."""

    starts: list[int]
    ends: list[int]
    members: list[tuple[tuple[int, float], ...]]
    struct: LoraSegments
    num_members: int
    member_rows: int  # sum over segments of rows times members
    slots: frozenset[int]

    def is_of(self, segments: Segments) -> bool:
        return self.starts == segments.starts and self.ends == segments.ends and self.members == segments.members


@dataclass(slots=True)
class LoraWeights:
    """What the calls over one arena share; lives in `SlotWeights.scratch`."""

    version: int = -1
    known: set[int] = field(default_factory=set)  # slots whose padded ranks are at most max_stride, as of `version`
    max_stride: int = 0  # never falls: the memory doesn't either
    memory: npt.NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    calls: dict[tuple[int, ...], tuple[SiteGroup, LoraGroup, _LoraArgs]] = field(default_factory=dict)
    """by SiteGroup.rows"""

    def scratch(self, weights: SlotWeights, flat: FlatSegments, slices: int) -> tuple[int, int]:
        """Address and elements of the memory between the phases, enough for `flat` at a site of `slices` slices.

        Of the table only the rows of `flat`'s slots are read, and those once per version: it may be large.
        """
        if self.version != weights.version:
            self.known.clear()
            self.version = weights.version
        if not flat.slots <= self.known:
            strides = weights.table.numpy()[list(flat.slots), :, STRIDE]
            self.max_stride = max(self.max_stride, int(strides.max()))
            self.known |= flat.slots
        elements = slices * (flat.member_rows * (-(-self.max_stride // 32) * 32) + 32 * flat.num_members)
        if elements + _ALIGNMENT > len(self.memory):
            self.memory = np.empty(2 * elements + _ALIGNMENT, np.uint16)
        start = self.memory.ctypes.data
        return start + -start % _ALIGNMENT, elements

    def call(self, weights: SlotWeights, group: SiteGroup) -> _LoraArgs:
        """The arguments of calls at one site; what changes from call to call is the caller's to set."""
        kept = self.calls.get(group.rows)
        if kept is None or (kept[0] is not group and kept[0] != group):
            struct = lora_group(group)
            args = _LoraArgs(weights.arena.data_ptr(), weights.table.data_ptr(), weights.table.shape[1])
            args.group = ctypes.addressof(struct)
            kept = self.calls[group.rows] = (group, struct, args)
        return kept[2]


def lora_group(group: SiteGroup) -> LoraGroup:
    """`group` as C reads it; K 0 is an embedding."""
    count = len(group.rows)
    arrays = ((c_int32 * count)(*values) for values in (group.rows, group.offsets, group.widths))
    return LoraGroup(*arrays, count, group.in_features)


def lora_segments(segments: Segments) -> FlatSegments:
    """`segments` as C reads them, made once and kept in their scratch until they change."""
    kept = cast(FlatSegments | None, segments.scratch.get("cpu"))
    if kept is None or not kept.is_of(segments):
        kept = segments.scratch["cpu"] = _flatten(segments)
    return kept


def lora_weights(weights: SlotWeights) -> LoraWeights:
    """The arena's own, made at first use."""
    kept = weights.scratch.get("cpu")
    if kept is None:
        kept = weights.scratch["cpu"] = LoraWeights()
    return cast(LoraWeights, kept)


class Lora:
    """The two ops over one library."""

    def __init__(self, library: Library) -> None:
        self._run: Callable[[object], int] = library.function("ml_segmented_lora", c_void_p)

    def segmented_lora(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None:
        """See kernels/ops.py."""
        if weights.arena.dtype is not torch.bfloat16:
            torch_backend.segmented_lora(y, x, weights, group, segments)
            return
        args = lora_weights(weights).call(weights, group)
        args.x, args.x_stride = x.data_ptr(), x.stride(0)
        self._call(args, y, weights, group, segments)

    def segmented_embedding(
        self, y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments
    ) -> None:
        """See kernels/ops.py."""
        if weights.arena.dtype is not torch.bfloat16:
            torch_backend.segmented_embedding(y, ids, weights, row, segments)
            return
        ids = ids.contiguous()
        group = SiteGroup(rows=(row,), offsets=(0,), widths=(y.shape[1],), in_features=0)
        args = lora_weights(weights).call(weights, group)
        args.ids = ids.data_ptr()
        self._call(args, y, weights, group, segments)

    def _call(
        self, args: _LoraArgs, y: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None:
        flat = lora_segments(segments)
        args.segments = ctypes.addressof(flat.struct)
        args.y, args.y_stride = y.data_ptr(), y.stride(0)
        args.scratch, args.scratch_elements = lora_weights(weights).scratch(weights, flat, len(group.rows))
        status = self._run(ctypes.byref(args))
        if status:
            raise RuntimeError(f"segmented_lora over {group}: {_STATUS[status]}")


def _flatten(segments: Segments) -> FlatSegments:
    count = len(segments)
    firsts = [0]
    for members in segments.members:
        firsts.append(firsts[-1] + len(members))
    flat = [member for members in segments.members for member in members]
    struct = LoraSegments(
        (c_int32 * count)(*segments.starts),
        (c_int32 * count)(*segments.ends),
        (c_int32 * (count + 1))(*firsts),
        (c_int32 * len(flat))(*(slot for slot, _ in flat)),
        (c_float * len(flat))(*(weight for _, weight in flat)),
        count,
    )
    lengths = (end - start for start, end in zip(segments.starts, segments.ends, strict=True))
    member_rows = sum(rows * len(members) for rows, members in zip(lengths, segments.members, strict=True))
    slots = frozenset(slot for slot, _ in flat)
    return FlatSegments(
        segments.starts.copy(), segments.ends.copy(), segments.members.copy(), struct, len(flat), member_rows, slots
    )
