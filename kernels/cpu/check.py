"""A short proof that a library computes what it should on this very processor, before anybody is answered with it."""

from __future__ import annotations

import numpy as np
import torch

from kernels import torch_backend
from kernels.cpu.attention import PagedAttention
from kernels.cpu.gemm import Gemm
from kernels.native_library import Library
from kernels.types import AttentionMetadata

_ROWS = (1, 5, 40)  # a row, a part of a tile, several tiles
_TOLERANCE = 0.02  # of the largest value: bf16 rounds at 0.004, a wrong tile is off by all there is


def is_right(library: Library) -> bool:
    """Whether products, an attention prefill and a decode come out as torch's do; takes milliseconds."""
    generator = torch.Generator().manual_seed(0)
    return all(_multiplies(library, rows, generator) for rows in _ROWS) and _attends(library, generator)


def _multiplies(library: Library, rows: int, generator: torch.Generator) -> bool:
    weight = torch.randn(50, 96, generator=generator).to(torch.bfloat16)
    x = torch.randn(rows, 96, generator=generator).to(torch.bfloat16)
    return _is_close(Gemm(library).pack(weight).linear(x), x.float() @ weight.float().T)


def _attends(library: Library, generator: torch.Generator) -> bool:
    """40 query rows of one request over their own 40 keys, two heads to a KV head; then the last row alone."""
    rows, block = 40, 16
    q, k, v = (torch.randn(rows, heads, 64, generator=generator).to(torch.bfloat16) for heads in (4, 2, 2))
    slots = torch.arange(block, block + rows)
    k_cache, v_cache = (torch.zeros(5, block, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    torch_backend.write_kv(k, v, k_cache, v_cache, slots)
    table = np.array([[1, 2, 3]], np.int32)
    prefill = AttentionMetadata(0, [0, rows], [rows], table, slots, block)
    decode = AttentionMetadata(1, [0, 1], [rows], table, slots[-1:], block)
    ours, right = (
        torch.cat(
            [
                attend(queries, k_cache, v_cache, meta, scale=0.125, sliding_window=None, softcap=None)
                for queries, meta in ((q, prefill), (q[-1:], decode))
            ]
        )
        for attend in (PagedAttention(library).paged_attention, torch_backend.paged_attention)
    )
    return _is_close(ours, right)


def _is_close(ours: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((ours.float() - right.float()).abs().max() <= _TOLERANCE * right.float().abs().max())
