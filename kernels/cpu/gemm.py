"""Linear layers, embeddings and the choice of tokens over packed bf16 weights (csrc/gemm.h, csrc/topk.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from kernels.memory import lazy_zeros
from kernels.native_library import Library

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class GemmArgs(ctypes.Structure):
    """csrc/gemm.h's GemmArgs: addresses, and sizes in elements."""

    _fields_ = [
        ("x", _POINTER),
        ("x_stride", _SIZE),
        ("w", _POINTER),
        ("bias", _POINTER),
        ("y", _POINTER),
        ("y_stride", _SIZE),
        ("rows", _SIZE),
        ("n", _SIZE),
        ("k", _SIZE),
    ]


class TopkArgs(ctypes.Structure):
    """csrc/topk.h's TopkArgs."""

    _fields_ = [("logits", _POINTER), ("stride", _SIZE), ("rows", _SIZE), ("n", _SIZE), ("k", _SIZE), ("ids", _POINTER)]


class Gemm:
    """The library's functions on packed weights and on logits."""

    def __init__(self, library: Library) -> None:
        self.linear = library.function("ml_gemm", _POINTER)
        self.unpack_rows = library.function("ml_unpack_rows", _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE)
        self._pack = library.function("ml_pack", _POINTER, _SIZE, _SIZE, _SIZE, _POINTER)
        self._packed_bytes = library.function("ml_packed_bytes", _SIZE, _SIZE, result=_SIZE)
        self._argmax = library.function("ml_argmax", _POINTER)
        self._topk = library.function("ml_topk", _POINTER)

    def packed_size(self, n: int, k: int) -> int:
        """Elements of a packed [N, K] weight."""
        return int(self._packed_bytes(n, k)) // 2

    def pack(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> PackedWeight:
        """A packed copy of `weight` [N, K] bf16 whose rows are contiguous; the caller frees the original.

        out  where to: bf16 [packed_size(N, K)], 64-byte aligned; a part of one `aligned_empty` for all of a
             model's weights keeps them on huge pages. None: memory of its own

        Raises ValueError.
        """
        if weight.ndim != 2 or weight.dtype != torch.bfloat16 or weight.stride(1) != 1:
            raise ValueError(
                f"a weight to pack is 2-D bf16 with contiguous rows, not {tuple(weight.shape)} {weight.dtype}"
            )
        n, k = weight.shape
        size = self.packed_size(n, k)
        data = aligned_empty(size) if out is None else out
        if data.shape != (size,) or data.dtype != torch.bfloat16 or not data.is_contiguous() or data.data_ptr() % 64:
            raise ValueError(f"out must be bf16 [{size}], contiguous and 64-byte aligned, for a weight [{n}, {k}]")
        self._pack(weight.data_ptr(), weight.stride(0), n, k, data.data_ptr())
        return PackedWeight(self, data, n, k)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 [rows]: the first column of each row's largest logit (bf16 [rows, N]), -1 for a row with a NaN."""
        return self._best(self._argmax, logits, 1)[:, 0]

    def topk(self, logits: torch.Tensor, k: int) -> torch.Tensor:
        """int64 [rows, k]: each row's best columns in descending order, equal logits by ascending column.

        A row with a NaN gives -1. Raises ValueError unless logits are bf16 [rows, N] and 1 <= k <= N.
        """
        return self._best(self._topk, logits, k)

    def _best(self, function: Callable[..., Any], logits: torch.Tensor, k: int) -> torch.Tensor:
        if logits.ndim != 2 or logits.dtype != torch.bfloat16 or logits.stride(1) != 1:
            raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, not bf16 [rows, N], contiguous rows")
        rows, n = logits.shape
        if not 1 <= k <= n:
            raise ValueError(f"k = {k} of {n} logits")
        ids = torch.empty(rows, k, dtype=torch.int64)
        function(ctypes.byref(TopkArgs(logits.data_ptr(), logits.stride(0), rows, n, k, ids.data_ptr())))
        return ids


class PackedWeight:
    """W [N, K] in the packed layout, with what is computed from it."""

    def __init__(self, functions: Gemm, data: torch.Tensor, n: int, k: int) -> None:
        self.data = data  # bf16 [packed elements], 64-byte aligned
        self.n = n
        self.k = k
        self._functions = functions

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + bias for x [rows, K], one rounding at the end -> [rows, N]; all bf16, rows contiguous.

        out  where the result goes; it may not overlap x. None: a new tensor

        A row's bits depend on that row alone. Raises ValueError.
        """
        _check("x", x, (len(x), self.k))
        y = torch.empty(len(x), self.n, dtype=torch.bfloat16) if out is None else out
        _check("out", y, (len(x), self.n))
        if bias is not None:
            _check("bias", bias, (self.n,))
        args = GemmArgs(
            *(x.data_ptr(), x.stride(0), self.data.data_ptr(), None if bias is None else bias.data_ptr()),
            *(y.data_ptr(), y.stride(0), len(x), self.n, self.k),
        )
        self._functions.linear(ctypes.byref(args))
        return y

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """W[ids] for int64 ids [count], each in 0..N-1 (not checked): an embedding's lookup -> [count, K] bf16."""
        ids = ids.contiguous()
        out = torch.empty(len(ids), self.k, dtype=torch.bfloat16)
        address, k = self.data.data_ptr(), self.k
        self._functions.unpack_rows(address, k, ids.data_ptr(), len(ids), out.data_ptr(), k)
        return out


def aligned_empty(elements: int) -> torch.Tensor:
    """bf16 [elements] on pages of its own."""
    return lazy_zeros(2 * elements).view(torch.bfloat16)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; needed: {shape} bf16, contiguous in its last dimension"
        )
