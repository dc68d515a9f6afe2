"""The small ops in one Triton kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loadtest.gpu.small import EPS

_SWIGLU_BLOCK = 1024


class TritonOps:
    """See small.SmallOps."""

    def add_norm(self, residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        rows, hidden = residual.shape
        out = torch.empty_like(residual)
        block = triton.next_power_of_2(hidden)
        _add_norm[(rows,)](
            residual,
            residual if x is None else x,
            weight,
            out,
            hidden,
            EPS,
            ADDS=x is not None,
            BLOCK=block,
            num_warps=8,
        )
        return out

    def rope(self, heads: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor) -> None:
        rows, count, dims = heads.shape
        _rope[(rows, count)](
            heads,
            positions,
            angles,
            heads.stride(0),
            heads.stride(1),
            HALF=dims // 2,
            BLOCK=triton.next_power_of_2(dims // 2),
            num_warps=1,
        )

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, both = gate_up.shape
        out = torch.empty(rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
        _swiglu[(rows, triton.cdiv(both // 2, _SWIGLU_BLOCK))](
            gate_up, out, both // 2, BLOCK=_SWIGLU_BLOCK, num_warps=4
        )
        return out


@triton.jit
def _add_norm(
    residual: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    place = tl.program_id(0) * hidden + at
    held = tl.load(residual + place, mask=mask, other=0.0)
    wide = held.to(tl.float32)
    if ADDS:
        wide = (wide + tl.load(x + place, mask=mask, other=0.0).to(tl.float32)).to(held.dtype).to(tl.float32)
        tl.store(residual + place, wide.to(held.dtype), mask=mask)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    factors = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (wide * scale * factors).to(held.dtype), mask=mask)


@triton.jit
def _rope(
    heads: tl.tensor,
    positions: tl.tensor,
    angles: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask = at < HALF
    turned = angles + (tl.load(positions + row) * HALF + at) * 2
    cos = tl.load(turned, mask=mask, other=0.0)
    sin = tl.load(turned + 1, mask=mask, other=0.0)
    place = heads + row.to(tl.int64) * row_stride + tl.program_id(1) * head_stride + at
    first = tl.load(place, mask=mask, other=0.0)
    second = tl.load(place + HALF, mask=mask, other=0.0)
    low, high = first.to(tl.float32), second.to(tl.float32)
    tl.store(place, (low * cos - high * sin).to(first.dtype), mask=mask)
    tl.store(place + HALF, (high * cos + low * sin).to(first.dtype), mask=mask)


@triton.jit
def _swiglu(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    held = tl.load(gate_up + row * 2 * width + at, mask=mask, other=0.0)
    gate, up = held.to(tl.float32), tl.load(gate_up + row * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate / (1 + tl.exp(-gate)) * up).to(held.dtype), mask=mask)
