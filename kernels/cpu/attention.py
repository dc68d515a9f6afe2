"""write_kv and paged_attention on the native library, for bf16; what it does not do goes to torch's backend.

Contracts in kernels/ops.py; csrc/attention.h has the structures that are mirrored here.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from kernels import torch_backend
from kernels.native_library import Library
from kernels.types import AttentionMetadata

HEAD_DIM_UNIT = 16
"""The native kernel takes head_dims that are multiples of this."""


class _WriteKvArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("k", "v", "k_cache", "v_cache", "slot_mapping")),
        *((name, c_int64) for name in ("rows", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride")),
    ]


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k_cache", "v_cache", "out")),
        *((name, c_void_p) for name in ("query_starts", "context_lens", "block_tables", "sinks", "scratch")),
        *((name, c_int64) for name in ("rows", "requests", "max_blocks", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "q_row_stride", "q_head_stride")),
        *((name, c_int64) for name in ("out_row_stride", "out_head_stride", "sliding_window")),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


@dataclass(slots=True)
class StepArrays:
    """An AttentionMetadata as the kernel reads it; made once per step, kept in its scratch."""

    query_starts: np.ndarray  # int32 [requests + 1]
    context_lens: np.ndarray  # int32 [requests]
    block_tables: np.ndarray  # int32 [requests, max blocks], contiguous

    def fill(self, args: ctypes.Structure) -> None:
        """Set the fields of that name, and `requests` and `max_blocks`, in a structure that has them."""
        args.query_starts = self.query_starts.ctypes.data
        args.context_lens = self.context_lens.ctypes.data
        args.block_tables = self.block_tables.ctypes.data
        args.requests, args.max_blocks = self.block_tables.shape


def step_arrays(meta: AttentionMetadata) -> StepArrays:
    """Those of `meta`, made at the first call of its step."""
    arrays = meta.scratch.get("cpu")
    if arrays is None:
        arrays = meta.scratch["cpu"] = StepArrays(
            np.asarray(meta.query_starts, dtype=np.int32),
            np.asarray(meta.context_lens, dtype=np.int32),
            np.ascontiguousarray(meta.block_tables, dtype=np.int32),
        )
    return cast(StepArrays, arrays)


class PagedAttention:
    """The two ops at one level. Safe to call from several threads; each call uses OpenMP's pool."""

    def __init__(self, library: Library) -> None:
        self._write_kv = library.function("ml_write_kv", c_void_p)
        self._attention = library.function("ml_paged_attention", c_void_p)
        self._scratch_bytes = library.function("ml_attention_scratch_bytes", c_void_p, result=c_int64)

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See kernels/ops.py."""
        if k_cache.dtype != torch.bfloat16 or k.stride(2) != 1 or v.stride(2) != 1:
            torch_backend.write_kv(k, v, k_cache, v_cache, slot_mapping)
            return
        slots = slot_mapping.contiguous()
        args = _WriteKvArgs(
            *(t.data_ptr() for t in (k, v, k_cache, v_cache, slots)), *k.shape, *k.stride()[:2], *v.stride()[:2]
        )
        self._write_kv(ctypes.byref(args))

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See kernels/ops.py. Scores, softmax and sums are fp32, each probability is rounded once.

        A row's bits depend on its query and the keys it sees alone.
        """
        if not is_native(q):
            return torch_backend.paged_attention(
                q, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
            )
        out = torch.empty(q.shape, dtype=q.dtype)
        sink_logits = None if sinks is None else sinks.to(torch.float32).contiguous()
        args = _AttentionArgs(q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr())
        step_arrays(meta).fill(args)
        args.sinks = None if sink_logits is None else sink_logits.data_ptr()
        args.rows, args.heads, args.head_dim = q.shape
        args.kv_heads, args.block_size = k_cache.shape[2], meta.block_size
        args.q_row_stride, args.q_head_stride = q.stride()[:2]
        args.out_row_stride, args.out_head_stride = out.stride()[:2]
        args.sliding_window, args.scale, args.softcap = sliding_window or 0, scale, softcap or 0.0
        scratch = torch.empty(self._scratch_bytes(ctypes.byref(args)) // 4, dtype=torch.float32)
        args.scratch = scratch.data_ptr()
        self._attention(ctypes.byref(args))
        return out


def is_native(q: torch.Tensor) -> bool:
    """Whether the native kernel takes queries like these."""
    return bool(q.dtype == torch.bfloat16 and q.shape[2] % HEAD_DIM_UNIT == 0 and q.stride(2) == 1)
