"""y += sum over members of w (B v + bias): the second launch of a packed projection, and an embedding's only one.

A program takes a span of one slice's columns and goes over tiles of the plan as far as there are any: one
writer for each element of y, whatever the number of members. A tile of which no member has the site is left
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import GEOMETRY, product_of_fp32, read_site, rounded


@triton.jit
def _load_v(
    source,  # linear: v, fp32; embedding: ids of the tile's rows [BLOCK_M]
    arena,
    a,  # embedding: offset of A [V, stride]
    stride,
    v_row,
    column,
    v_split,
    r,
    rank,
    weight,
    row_mask,
    EMBEDDING: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_R]: w A x, zeros beyond the rows and the rank."""
    mask = row_mask[:, None] & (r < rank)[None, :]
    if EMBEDDING:
        total = tl.load(arena + a + source[:, None] * stride + r[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        rows = (v_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        at = source + rows[:, None] * WIDTH + (column + r)[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        AT_ONCE: tl.constexpr = 4096 // (BLOCK_M * BLOCK_R)  # parts in flight: 32 registers of a thread
        if AT_ONCE >= SPLITS:
            for split in tl.static_range(SPLITS):
                total += tl.load(at + split * v_split, mask=mask, other=0.0)
        else:
            for split in tl.range(0, SPLITS, num_stages=1, loop_unroll_factor=AT_ONCE):
                total += tl.load(at + split * v_split, mask=mask, other=0.0)
    return total * weight


@triton.jit
def _add(acc, v, arena, b, stride, r, rank, n, width, FEW: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] + v B^T, for ranks r and columns n. B is read up to its padding, which is zeros."""
    columns = tl.where(rank > 0, stride, 0)
    if FEW:
        mask = (n < width)[:, None] & (r < columns)[None, :]
        up = tl.load(arena + b + n.to(tl.int64)[:, None] * stride + r[None, :], mask=mask, other=0.0)
        return acc + tl.sum(v[:, None, :] * up.to(tl.float32)[None, :, :], 2)
    else:
        mask = (n < width)[None, :] & (r < columns)[:, None]
        up = tl.load(arena + b + n.to(tl.int64)[None, :] * stride + r[:, None], mask=mask, other=0.0)
        return product_of_fp32(v, up, acc)


@triton.jit
def _add_bias(acc, arena, bias, weight, n, width):
    if bias >= 0:
        beta = tl.load(arena + bias + n, mask=n < width, other=0.0).to(tl.float32)
        acc += (weight * beta)[None, :]
    return acc


@triton.jit(do_not_specialize=["site_rows", "v_split", "span_blocks"])
def expand(
    y,  # [rows, columns], rows stride_y apart
    source,  # linear: v, fp32 [SPLITS, v rows, NUM_SLICES * BUCKET]; embedding: ids, int64 [rows]
    arena,
    table,  # int64 [slots, site_rows, 5]
    records,  # int32: kernels/triton/plan.py
    geometry,  # int32 [NUM_SLICES, GEOMETRY]
    stride_y,
    site_rows,
    v_split,
    span_blocks,  # blocks of columns of a program
    NUM_SLICES: tl.constexpr,
    BUCKET: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SETS: tl.constexpr,
    EMBEDDING: tl.constexpr,
    ALIGNED: tl.constexpr,  # all offsets and widths are multiples of 16
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (spans of all slices, tiles at once)."""
    WIDTH: tl.constexpr = NUM_SLICES * BUCKET
    span_columns = span_blocks * BLOCK_N
    piece, span = 0, tl.program_id(0)
    for i in tl.static_range(NUM_SLICES - 1):  # which slice this span is in
        spans = tl.cdiv(tl.load(geometry + i * GEOMETRY + 2), span_columns)
        is_after = (piece == i) & (span >= spans)
        piece = tl.where(is_after, i + 1, piece)
        span = tl.where(is_after, span - spans, span)
    row = tl.load(geometry + piece * GEOMETRY)
    offset = tl.load(geometry + piece * GEOMETRY + 1)
    width = tl.load(geometry + piece * GEOMETRY + 2)
    if ALIGNED:
        offset, width = tl.multiple_of(offset, 16), tl.multiple_of(width, 16)
    n_begin = span * span_columns
    n_end = tl.minimum(n_begin + span_columns, width)
    column = piece * BUCKET
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_R)

    num_tiles = tl.load(records)
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        record = records + (1 + tile) * 8
        start, rows = tl.load(record), tl.load(record + 1)
        slot, v_row = tl.load(record + 2), tl.load(record + 3)
        weight = tl.load(record + 4).to(tl.float32, bitcast=True)
        others, others_end = tl.load(record + 5), tl.load(record + 6)
        a, b, bias, rank, stride = read_site(table, slot, site_rows, row, BUCKET)
        is_touched = (rank > 0) | (bias >= 0)
        if HAS_SETS:
            for other in range(others, others_end):
                _, _, its_bias, its_rank, _ = read_site(table, tl.load(records + other * 8 + 2), site_rows, row, BUCKET)
                is_touched = is_touched | (its_rank > 0) | (its_bias >= 0)
        if is_touched:
            row_mask = m < rows
            y_rows = y + (start + m).to(tl.int64) * stride_y + offset
            if EMBEDDING:
                rows_source = tl.load(source + start + m, mask=row_mask, other=0)
            else:
                rows_source = source
            v = _load_v(
                rows_source, arena, a, stride, v_row, column, v_split, c, rank, weight, row_mask,
                EMBEDDING, SPLITS, WIDTH, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            for n_first in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES):
                n = n_first + tl.arange(0, BLOCK_N)
                y_at = y_rows[:, None] + n[None, :]
                y_mask = row_mask[:, None] & (n < width)[None, :]
                before = tl.load(y_at, mask=y_mask, other=0.0)  # here, so that it is under way with B
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                acc = _add(acc, v, arena, b, stride, c, rank, n, width, FEW)
                if BUCKET > BLOCK_R:
                    for first in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
                        more = _load_v(
                            rows_source, arena, a, stride, v_row, column, v_split, first + c, rank, weight, row_mask,
                            EMBEDDING, SPLITS, WIDTH, BLOCK_M, BLOCK_R,
                        )  # fmt: skip
                        acc = _add(acc, more, arena, b, stride, first + c, rank, n, width, FEW)
                acc = _add_bias(acc, arena, bias, weight, n, width)
                if HAS_SETS:
                    for other in range(others, others_end):
                        its = records + other * 8
                        its_weight = tl.load(its + 4).to(tl.float32, bitcast=True)
                        its_a, its_b, its_bias, its_rank, its_stride = read_site(
                            table, tl.load(its + 2), site_rows, row, BUCKET
                        )
                        for first in tl.range(0, its_rank, BLOCK_R, num_stages=1):
                            its_v = _load_v(
                                rows_source, arena, its_a, its_stride, tl.load(its + 3), column, v_split, first + c,
                                its_rank, its_weight, row_mask, EMBEDDING, SPLITS, WIDTH, BLOCK_M, BLOCK_R,
                            )  # fmt: skip
                            acc = _add(acc, its_v, arena, its_b, its_stride, first + c, its_rank, n, width, FEW)
                        acc = _add_bias(acc, arena, its_bias, its_weight, n, width)
                tl.store(y_at, rounded(before.to(tl.float32) + acc, y.dtype.element_ty), mask=y_mask)
