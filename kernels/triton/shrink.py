"""v = A x for each (entry, row, slice): the first of the two launches of a packed projection.

A program takes one part of K for some ranks of one slice (in prefill: of all slices whose ranks fit a block,
so that x is read once), and goes over entries of the plan as far as there are any. Its sum over its part of K
goes to v[part]; the expand adds the parts up in their order. What a true rank does not reach is not read and
not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import GEOMETRY, product, read_site


@triton.jit
def _block(
    x_rows,  # pointers [BLOCK_M] to the first element of each row
    row_mask,  # [BLOCK_M]
    a_rows,  # pointers [BLOCK_R] to the first element of each row of A
    rank_mask,  # [BLOCK_R]
    v_rows,  # pointers [BLOCK_M]
    columns,  # [BLOCK_R] of v
    column_mask,  # [BLOCK_R]: all of rank_mask, and those that may get zeros
    k_begin,
    K,
    num_k,
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """v[rows, columns] = the sum over num_k blocks of K."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for i in tl.range(0, 1 if IS_SINGLE else num_k, num_stages=STAGES):
        k = k_begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < K
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        if FEW:
            a = tl.load(a_rows[:, None] + k[None, :], mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
            acc += tl.sum(x.to(tl.float32)[:, None, :] * a.to(tl.float32)[None, :, :], 2)
        else:
            a = tl.load(a_rows[None, :] + k[:, None], mask=rank_mask[None, :] & k_mask[:, None], other=0.0)
            acc = product(x, a, acc)
    tl.store(v_rows[:, None] + columns[None, :], acc, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["site_rows", "v_split", "num_k"])
def shrink(
    x,  # [rows, K], rows stride_x apart
    v,  # fp32 [splits, v rows, NUM_SLICES * BUCKET], splits v_split apart
    arena,
    table,  # int64 [slots, site_rows, 5]
    records,  # int32: kernels/triton/plan.py
    geometry,  # int32 [NUM_SLICES, GEOMETRY]
    K,
    stride_x,
    site_rows,
    v_split,
    num_k,  # blocks of a part of K
    NUM_SLICES: tl.constexpr,
    BUCKET: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share a slice's ranks; 0: one program has all slices
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SINGLE: tl.constexpr,  # num_k is 1
    STAGES: tl.constexpr,
):
    """Grid (splits * slices * PARTS, entries at once)."""
    ACROSS: tl.constexpr = NUM_SLICES * PARTS if PARTS else 1
    WIDTH: tl.constexpr = NUM_SLICES * BUCKET
    split = tl.program_id(0) // ACROSS
    across = tl.program_id(0) % ACROSS
    k_begin = split * num_k * BLOCK_K
    v += split.to(tl.int64) * v_split
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_R)
    num_entries = tl.load(records + 1)
    for entry in range(tl.program_id(1), num_entries, tl.num_programs(1)):
        record = records + (1 + entry) * 8
        start, rows = tl.load(record), tl.load(record + 1)
        slot, v_row = tl.load(record + 2), tl.load(record + 3)
        row_mask = m < rows
        x_rows = x + (start + m).to(tl.int64) * stride_x
        v_rows = v + (v_row + m).to(tl.int64) * WIDTH
        if PARTS == 0:
            row = tl.load(geometry + tl.minimum(c // BUCKET, NUM_SLICES - 1) * GEOMETRY)
            a, _, _, rank, _ = read_site(table, slot, site_rows, row, BUCKET)
            rank = tl.where(c < WIDTH, rank, 0)
            rank_mask = c % BUCKET < rank
            if tl.max(rank, 0) > 0:
                a_rows = arena + a + (c % BUCKET).to(tl.int64) * K
                _block(
                    x_rows, row_mask, a_rows, rank_mask, v_rows, c, c < WIDTH, k_begin, K, num_k,
                    FEW, BLOCK_M, BLOCK_R, BLOCK_K, IS_SINGLE, STAGES,
                )  # fmt: skip
        else:
            piece = across // PARTS
            row = tl.load(geometry + piece * GEOMETRY)
            a, _, _, rank, _ = read_site(table, slot, site_rows, row, BUCKET)
            for first in range(across % PARTS * BLOCK_R, rank, PARTS * BLOCK_R):
                r = first + c
                a_rows = arena + a + r.to(tl.int64) * K
                columns = piece * BUCKET + r
                rank_mask = r < rank
                _block(
                    x_rows, row_mask, a_rows, rank_mask, v_rows, columns, rank_mask, k_begin, K, num_k,
                    FEW, BLOCK_M, BLOCK_R, BLOCK_K, IS_SINGLE, STAGES,
                )  # fmt: skip
