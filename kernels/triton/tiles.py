"""What the shrink and the expand have in common: reading a site, products, rounding. Device code."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.interpreter import IS_INTERPRETED

EMULATED = tl.constexpr(IS_INTERPRETED)
"""Under the interpreter bf16 products are garbage and casts to bf16 cut off: both are done in fp32 there."""

GEOMETRY = tl.constexpr(3)
"""int32 per slice of a packed projection: row of the slot table, first column in y, width."""


@triton.jit
def read_site(table, slot, site_rows, row, BUCKET: tl.constexpr):
    """A offset, B offset, bias offset (or -1), rank, stride of a slot's site: see kernels/types.py.

    `row` may be a block. Every tensor of an image lies at 128 bytes; B's padded rows are 8 elements or more.
    """
    at = table + (slot.to(tl.int64) * site_rows + row) * 5
    a = tl.multiple_of(tl.load(at), 32)
    b = tl.multiple_of(tl.load(at + 1), 32)
    bias = tl.load(at + 2)
    rank = tl.minimum(tl.load(at + 3).to(tl.int32), BUCKET)
    stride = tl.multiple_of(tl.load(at + 4).to(tl.int32), 8)
    return a, b, bias, rank, stride


@triton.jit
def product(a, b, acc):
    """acc + a b in fp32, the operands in the arena's dtype."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 to the nearest of `dtype`, ties to even."""
    if EMULATED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def product_of_fp32(v, b, acc):
    """acc + v b with v in fp32 and b in 16 bit: v as the sum of two 16-bit numbers, so that it keeps its digits.

    The first is cut at the dtype's largest number, so that the second takes what is beyond it, and an
    infinity stays one instead of becoming a difference of two.
    """
    if b.dtype == tl.float32:
        return product(v, b, acc)
    LARGEST: tl.constexpr = 65504.0 if b.dtype == tl.float16 else 3.3895313892515355e38
    high = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))
    high = rounded(high, b.dtype)
    low = rounded(v - high.to(tl.float32), b.dtype)
    return product(low, b, product(high, b, acc))
