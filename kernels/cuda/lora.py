"""segmented_lora in one launch for the steps that decode (csrc/lora.h); all others go to another backend.

    a step of up to 256 rows, ranks up to 64, no sets, bf16 or fp16      one launch a packed projection
    prefill, sets, larger ranks, fp32                                     `others`: kernels.triton

The plan is Triton's (kernels/triton/plan.py), at the same place, so graphs need to know of one kind only.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p

import torch

from kernels.native_library import Library
from kernels.ops import Backend
from kernels.triton.launch import geometry_of
from kernels.triton.plan import DeviceSegments, device_segments
from kernels.types import Segments, SiteGroup, SlotWeights

MAX_RANK = 64
TILE_ROWS = 16
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_ALIGNMENT_BYTES = 16
_ALIGNMENT = 8  # elements: the same


class _LoraArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "x", "arena", "table", "records", "geometry")),
        *((name, c_int64) for name in ("stride_y", "stride_x")),
        *((name, c_int32) for name in ("site_rows", "slices", "in_features")),
    ]


class Lora:
    """The kernel of one library for one device.

    others    the backend for what the kernel doesn't do
    is_early  programmatic dependent launch (csrc/lora.cu says what makes it safe); needs compute capability 9.0.
              Nobody may write the arena, the table or a plan by a *kernel* directly before a call in its stream
    resident  clusters that go over the work; None: as many as fit the device at once
    """

    def __init__(self, library: Library, others: Backend, *, is_early: bool, resident: int | None = None) -> None:
        self.others = others
        self.is_early = is_early
        self._launch = library.function("ml_cuda_lora", POINTER(_LoraArgs), c_int, c_int, c_int, c_int, c_int, c_void_p)
        self._error = library.function("ml_cuda_error", c_int, result=c_char_p)
        self._columns = int(library.function("ml_cuda_lora_columns")())
        fitting = library.function("ml_cuda_lora_resident", c_int, c_int, c_int)
        self._resident = functools.cache(lambda *variant: resident or int(fitting(*variant)))

    def segmented_lora(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None:
        """See kernels/ops.py."""
        if y.dtype not in _DTYPES:
            self.others.segmented_lora(y, x, weights, group, segments)
            return
        plan = device_segments(segments, weights, len(y))
        if not does(plan) or weights.arena.data_ptr() % _ALIGNMENT_BYTES:
            self.others.segmented_lora(y, x, weights, group, segments)
        elif plan.max_tiles:
            self._run(y, x, weights, group, plan)

    def _run(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, plan: DeviceSegments
    ) -> None:
        geometry = geometry_of(group, weights)
        tensors = (y, x, weights.arena, weights.table, plan.records, geometry)
        sizes = (weights.table.shape[1], len(group.rows), group.in_features)
        args = _LoraArgs(*(tensor.data_ptr() for tensor in tensors), y.stride(0), x.stride(0), *sizes)
        variant = (_DTYPES[y.dtype], 16 if plan.rank_bucket <= 16 else MAX_RANK, int(is_aligned(y, x, group)))
        across = sum(-(-width // self._columns) for width in group.widths)
        clusters = min(plan.max_tiles * across, self._resident(*variant))
        stream = torch.cuda.current_stream(y.device).cuda_stream if y.is_cuda else None
        status = self._launch(byref(args), *variant, clusters, int(self.is_early), stream)
        if status:
            raise RuntimeError(f"the CUDA kernel for adapters was not launched: {self._error(status).decode()}")


def does(plan: DeviceSegments) -> bool:
    """Whether the kernel computes the steps of a plan."""
    return plan.tile_rows <= TILE_ROWS and not plan.has_sets and plan.rank_bucket <= MAX_RANK


def is_aligned(y: torch.Tensor, x: torch.Tensor, group: SiteGroup) -> bool:
    """Whether all that is read and written of rows are whole 16 bytes at addresses of 16."""
    numbers = (group.in_features, x.stride(0), y.stride(0), *group.offsets, *group.widths)
    return not any(number % _ALIGNMENT for number in numbers) and not any(
        tensor.data_ptr() % _ALIGNMENT_BYTES for tensor in (y, x)
    )
