"""paged_attention in Triton, for decodes and prompts in one metadata. The contract stands in kernels/ops.py.

A tile is a few query rows of one request with all the query heads of one KV head, so that each key and value
is read once for all of them:

    decode    one row; its context is cut into chunks, which the programs of a tile share
    prefill   as many rows as fill the tile; chunks only where there are too few tiles to fill the device

Each chunk is attended to on its own, and where a tile has several a second kernel joins them, in order. How a
decode row's context is cut depends on its own length alone, so its bits don't depend on who else is in the
step; a prompt's may, where chunks of it are computed beside few others. Grids depend on Python ints alone:
the rows of the step, and the largest context that the DeviceAttention has room for. The rest is early exit.

A graph is captured of decodes alone, and all that differs from replay to replay comes from its DeviceAttention:
of the captured metadata only the number of decodes and block_size count. Chunks to be joined lie in memory of
rows x heads x head_dim x MAX_CHUNKS x 4 bytes at most, the same for every layer.
"""

import functools
from typing import NamedTuple

import torch
import triton

from kernels.triton.attend import attend_tiles, join_chunks
from kernels.triton.interpreter import IS_INTERPRETED
from kernels.triton.metadata import DeviceAttention, device_attention
from kernels.types import AttentionMetadata

MIN_CHUNK = 256
"""Keys of a chunk at least: below it a chunk's own result is too many bytes beside its keys and values."""
MAX_CHUNKS = 32
"""Of a tile at most; longer contexts have longer chunks."""
MIN_DECODE_PROGRAMS = 4
"""For the chunks of a decode tile at least, however many tiles there are: one context may be far the longest."""
NO_GPU_MULTIPROCESSORS = 132
"""What grids are sized for where there is no GPU to ask."""
MIN_REQUESTS = 1024
"""A prompt's tile finds its request among so many at least, so that one kernel serves all numbers of them."""


class TileShape(NamedTuple):
    """How a tile is computed; rows counts query rows times the query heads of a KV head."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """One grid of tiles over part of the step's rows."""

    is_decode: bool
    is_careful: bool  # only where a result of the launch before is not finite
    shape: TileShape
    tile_rows: int  # query rows of a tile
    first_request: int  # also its first row: the requests before it have one row each
    rows: int
    tiles: int
    programs: int  # a tile
    chunk_limit: int  # chunks a tile is cut into at most
    max_chunks: int  # those that the longest context can have, at most chunk_limit


def paged_attention(
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
    """See kernels/ops.py. Scores, softmax and sums are fp32; each probability is rounded once.

    A value that is not finite reaches no row that doesn't see it, also of its own request.
    """
    device = device_attention(meta)
    is_all_written = meta.num_decodes == len(meta.context_lens) or meta.query_starts[-1] == len(q)
    dtype = torch.float32 if _is_upcast(q) else q.dtype
    out = (torch.empty if is_all_written else torch.zeros)(q.shape, dtype=dtype, device=q.device)
    for launch in _launches(q, k_cache, meta, device, sliding_window):
        _attend(launch, q, k_cache, v_cache, out, device, scale, sliding_window, softcap, sinks)
    return out.to(q.dtype)


def _is_upcast(q: torch.Tensor) -> bool:
    """The interpreter's products of bf16 are wrong, and it rounds to bf16 towards zero."""
    return IS_INTERPRETED and q.dtype == torch.bfloat16


def _launches(
    q: torch.Tensor, k_cache: torch.Tensor, meta: AttentionMetadata, device: DeviceAttention, window: int | None
) -> list[Launch]:
    """Decodes first. A step of nothing else is one launch over all rows, also those of no request."""
    requests, decodes, kv_heads = len(meta.context_lens), meta.num_decodes, k_cache.shape[2]
    group = q.shape[1] // kv_heads
    launches = []
    rows = len(q) if decodes == requests else decodes
    if rows:
        longest = min(device.max_blocks * meta.block_size, window or 1 << 62)
        max_chunks = min(MAX_CHUNKS, max(1, triton.cdiv(longest, MIN_CHUNK)))
        wanted = triton.cdiv(4 * _num_multiprocessors(q.device), rows * kv_heads)
        programs = min(max_chunks, max(MIN_DECODE_PROGRAMS, wanted))
        shape = _decode_shape(q, group)
        launches.append(Launch(True, False, shape, 1, 0, rows, rows, programs, MAX_CHUNKS, max_chunks))
    if decodes < requests:
        rows = meta.query_starts[-1] - decodes
        for is_careful, shape in ((False, _prefill_shape(q, group)), (True, _careful_shape(q, group))):
            tile_rows = shape.rows // group
            tiles = rows // tile_rows + requests - decodes
            wanted = triton.cdiv(2 * _num_multiprocessors(q.device), tiles * kv_heads)
            longest = triton.cdiv(max(meta.context_lens[decodes:]), MIN_CHUNK)
            chunks = 1 if is_careful else min(MAX_CHUNKS, wanted, longest)
            launches.append(Launch(False, is_careful, shape, tile_rows, decodes, rows, tiles, chunks, chunks, chunks))
    return launches


def _attend(
    launch: Launch,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    device: DeviceAttention,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """The rows of one launch: their tiles, and where those can have several chunks, these joined."""
    heads, (_, block_size, kv_heads, head_dim) = q.shape[1], k_cache.shape
    parts = (launch.rows, heads, launch.max_chunks) if launch.max_chunks > 1 else (1, 1, 1)
    part_out = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    part_stats = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
    shared = (part_out, part_stats, out, sinks, device.query_starts, device.context_lens)
    numbers = (launch.first_request, device.max_requests, window or 0, launch.chunk_limit, launch.max_chunks)
    constants = {
        "IS_DECODE": launch.is_decode,
        "TILE_ROWS": launch.tile_rows,
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "MIN_CHUNK": MIN_CHUNK,
        "REQUESTS": max(MIN_REQUESTS, triton.next_power_of_2(device.max_requests)),
        "HAS_WINDOW": window is not None,
    }
    attend_tiles[(kv_heads, launch.tiles, launch.programs)](
        *shared,
        *numbers,
        q,
        k_cache,
        v_cache,
        device.block_tables,
        device.table_width,
        *q.stride(),
        scale,
        softcap or 0.0,
        **constants,
        IS_CAREFUL=launch.is_careful,
        BLOCK_SIZE=block_size,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_M=launch.shape.rows,
        BLOCK_N=launch.shape.keys,
        UPCAST=_is_upcast(q),
        num_warps=launch.shape.num_warps,
        num_stages=launch.shape.num_stages,
    )
    if launch.max_chunks > 1:
        join_chunks[(heads, launch.rows)](*shared, *numbers, **constants, CHUNKS=MAX_CHUNKS, num_warps=4)


def _decode_shape(q: torch.Tensor, group: int) -> TileShape:
    """Five stages keep two tiles of keys and values on their way: their addresses are loads of their own."""
    keys = 32 if q.shape[2] > 128 or q.dtype == torch.float32 else 64
    return TileShape(max(16, triton.next_power_of_2(group)), keys, 4, 3 if q.dtype == torch.float32 else 5)


def _prefill_shape(q: torch.Tensor, group: int) -> TileShape:
    """The largest that spills no register (tests/kernels/test_triton_attention.py)."""
    is_wide, is_ampere = q.shape[2] > 128, _is_ampere(q.device)
    if q.dtype == torch.float32:
        rows, keys, num_stages = 32, 16, 1
    elif is_wide:
        rows, keys, num_stages = (64, 32, 2) if is_ampere else (32, 64, 2)
    elif is_ampere:
        is_padded = q.shape[2] & (q.shape[2] - 1)  # masks take registers too
        rows, keys, num_stages = 64, 64, 2 if is_padded else 3
    else:
        rows, keys, num_stages = 128, 64, 3
    return TileShape(max(rows, triton.next_power_of_2(group)), keys, 8, num_stages)


def _careful_shape(q: torch.Tensor, group: int) -> TileShape:
    """Small: it hardly ever does more than look."""
    return TileShape(max(32, triton.next_power_of_2(group)), 16, 4, 1)


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    """Less than Hopper, whose matrix units read their operands from shared memory and not from registers."""
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) < (9, 0))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else NO_GPU_MULTIPROCESSORS
