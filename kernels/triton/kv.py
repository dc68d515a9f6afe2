"""write_kv in Triton. The contract stands in kernels/ops.py."""

import torch
import triton
import triton.language as tl


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See kernels/ops.py. Rows of the dummy block race there, and nobody reads what they leave."""
    rows, kv_heads, head_dim = k.shape
    if rows == 0:
        return
    _write_rows[(rows,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        *k.stride(),
        *v.stride(),
        slot_mapping.stride(0),
        ROW=kv_heads * head_dim,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(kv_heads * head_dim),
        num_warps=4,
    )


@triton.jit
def _write_rows(
    k,  # [rows, kv_heads, head_dim], any strides
    v,
    k_cache,  # [positions, kv_heads, head_dim], contiguous
    v_cache,
    slot_mapping,  # int64 [rows]
    k_row_stride,
    k_head_stride,
    k_dim_stride,
    v_row_stride,
    v_head_stride,
    v_dim_stride,
    slot_stride,
    ROW: tl.constexpr,  # kv_heads * head_dim
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of k and of v a program."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot_mapping + row * slot_stride) * ROW
    at = tl.arange(0, BLOCK)
    head, dim, is_in = at // HEAD_DIM, at % HEAD_DIM, at < ROW
    keys = tl.load(k + row * k_row_stride + head * k_head_stride + dim * k_dim_stride, mask=is_in)
    values = tl.load(v + row * v_row_stride + head * v_head_stride + dim * v_dim_stride, mask=is_in)
    tl.store(k_cache + place + at, keys, mask=is_in)
    tl.store(v_cache + place + at, values, mask=is_in)
