"""paged_attention in Triton, for decodes and prompts in one metadata. The contract stands in kernels/ops.py.

A tile is a few query rows of one request with all the query heads of one KV head, so that each key and value
is read once for all of them:

    decode    one row; its context is cut into chunks, which the programs of a tile share
    prefill   as many rows as fill the tile; chunks only where there are too few tiles to fill the device

Each chunk is attended to on its own, and where a tile has several a second kernel joins them, in order. How a
decode row's context is cut depends on its own length alone, so its bits don't depend on who else is in the
step; a prompt's may, where chunks of it are computed beside few others. Grids depend on Python ints alone:
the rows of the step, and the largest context that the DeviceAttention has room for. The rest is early exit.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

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
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
    _attend_tiles[(kv_heads, launch.tiles, launch.programs)](
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
        _join_chunks[(heads, launch.rows)](*shared, *numbers, **constants, CHUNKS=MAX_CHUNKS, num_warps=4)


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
    else:
        rows, keys, num_stages = (64, 64, 3) if is_ampere else (128, 64, 3)
    return TileShape(max(rows, triton.next_power_of_2(group)), keys, 8, num_stages)


def _careful_shape(q: torch.Tensor, group: int) -> TileShape:
    """Small: it hardly ever does more than look."""
    return TileShape(max(32, triton.next_power_of_2(group)), 16, 4, 1)


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    """Less than Hopper, whose matrix units read their operands from shared memory and not from registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else NO_GPU_MULTIPROCESSORS


@triton.jit
def _rows_of_tile(tile, query_starts, first_request, max_requests, TILE_ROWS: tl.constexpr, REQUESTS: tl.constexpr):
    """The request of a prefill tile and the tile's place in it.

    Request i's tiles begin at its row // TILE_ROWS + i, both counted from first_request: enough for all of
    its rows. So the request is the last that begins at the tile or before it.
    """
    ids = tl.arange(0, REQUESTS)
    is_request = (ids >= first_request) & (ids < max_requests)
    starts = tl.load(query_starts + ids, mask=is_request, other=0)
    begins = (starts - first_request) // TILE_ROWS + ids - first_request
    request = first_request + tl.sum((is_request & (begins <= tile)).to(tl.int32), 0) - 1
    start = tl.load(query_starts + request)
    index = tile - (start - first_request) // TILE_ROWS - (request - first_request)
    return request, start + index * TILE_ROWS


@triton.jit
def _chunks_of_tile(position, rows, window, chunk_limit, HAS_WINDOW: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """The keys begin : end that any row of a tile sees, and the length and number of their chunks.

    position: that of the tile's first row, which has at least one.
    """
    end = position + rows
    begin = tl.maximum(position - window + 1, 0) if HAS_WINDOW else 0
    chunk = tl.cdiv(tl.cdiv(end - begin, chunk_limit), MIN_CHUNK) * MIN_CHUNK
    return begin, end, chunk, tl.cdiv(end - begin, chunk)


@triton.jit
def _attend_keys(
    acc,  # fp32 [BLOCK_M, BLOCK_D]: sum of exp2(score - top) v
    total,  # fp32 [BLOCK_M]: sum of exp2(score - top)
    top,  # fp32 [BLOCK_M]: the largest score so far
    first,  # the first of BLOCK_N keys
    last,  # the chunk's end
    q_tile,
    positions,
    cache,
    scoring,
    IS_MASKED: tl.constexpr,  # some key lies at `last` or after it, or is hidden from some row
    IS_CAREFUL: tl.constexpr,  # no product of a value that is not finite with the weight 0 of who doesn't see it
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_N more keys; other arguments as in _attend_chunk."""
    k_cache, v_cache, block_table, kv_head = cache
    scale, softcap, window = scoring
    keys = first + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    is_dim = (dims < HEAD_DIM)[None, :]
    if IS_MASKED:
        is_key = keys < last
        blocks = tl.load(block_table + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    else:
        blocks = tl.load(block_table + keys // BLOCK_SIZE).to(tl.int64)
    places = ((blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
    k_at = k_cache + places[:, None] + dims[None, :]
    if IS_MASKED:
        k = tl.load(k_at, mask=is_key[:, None] & is_dim, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=is_dim, other=0.0)
    k = k.to(tl.float32) if UPCAST else k
    scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2_E / softcap))))
    scores = scores * LOG2_E
    if IS_MASKED:
        is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (keys[None, :] > positions[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if IS_MASKED else new_top  # a row that sees none yet
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(top - shift)
    total = total * factor + tl.sum(weights, 1)
    acc = acc * factor[:, None]
    v_at = v_cache + places[:, None] + dims[None, :]
    if IS_CAREFUL:
        is_read = is_key[:, None] & is_dim
        is_finite = tl.abs(tl.load(v_at, mask=is_read, other=0.0).to(tl.float32)) < float("inf")
        is_clean = tl.min(is_finite.to(tl.int32), 1) > 0  # [BLOCK_N]
        is_poisoned = tl.max((is_seen & ~is_clean[None, :]).to(tl.int32), 1) > 0  # [BLOCK_M]
        acc = tl.where(is_poisoned[:, None], float("nan"), acc)
        v = tl.load(v_at, mask=is_read & is_clean[:, None], other=0.0)
    elif IS_MASKED:
        v = tl.load(v_at, mask=is_key[:, None] & is_dim, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        v = tl.load(v_at)
    else:
        v = tl.load(v_at, mask=is_dim, other=0.0)
    weights, v = (weights, v.to(tl.float32)) if UPCAST else (weights.to(v.dtype), v)
    acc = tl.dot(weights, v, acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _attend_chunk(
    first,
    last,
    q_tile,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M]
    lowest,  # the first position of a row, and the last
    highest,
    cache,  # k_cache, v_cache, the request's block table, the KV head
    scoring,  # scale, softcap, window
    IS_DECODE: tl.constexpr,
    IS_CAREFUL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All rows of a tile over the keys first : last. Returns acc, total and top as _attend_keys has them."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    begun = first  # from which on every row's window has begun
    ended = first  # from which on some row comes before the keys
    if not IS_DECODE and not IS_CAREFUL:
        if HAS_WINDOW:
            begun += tl.cdiv(tl.maximum(highest - scoring[2] + 1 - first, 0), BLOCK_N) * BLOCK_N
            begun = tl.minimum(begun, last)
        ended = begun + tl.maximum(tl.minimum(last, lowest + 1) - begun, 0) // BLOCK_N * BLOCK_N
    num_before = tl.cdiv(begun - first, BLOCK_N)
    for index in range(num_before + tl.cdiv(last - ended, BLOCK_N)):  # what some row doesn't see
        key = tl.where(index < num_before, first + index * BLOCK_N, ended + (index - num_before) * BLOCK_N)
        acc, total, top = _attend_keys(
            acc, total, top, key, last, q_tile, positions, cache, scoring, True, IS_CAREFUL,
            KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
    if not IS_DECODE and not IS_CAREFUL:
        for key in range(begun, ended, BLOCK_N):
            acc, total, top = _attend_keys(
                acc, total, top, key, last, q_tile, positions, cache, scoring, False, False,
                KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
    return acc, total, top


@triton.jit(do_not_specialize=["first_request", "max_requests", "window", "chunk_limit", "max_chunks"])
def _attend_tiles(
    part_out,  # fp32 [rows of the launch, heads, max_chunks, HEAD_DIM]; not divided by its sum yet
    part_stats,  # fp32 [rows of the launch, heads, max_chunks, 2]: largest score (base 2), sum
    out,  # [rows of the step, heads, HEAD_DIM], contiguous
    sinks,  # [heads] or None
    query_starts,
    context_lens,
    first_request,
    max_requests,
    window,
    chunk_limit,
    max_chunks,
    q,  # [rows of the step, heads, HEAD_DIM], any strides
    k_cache,  # [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], contiguous
    v_cache,
    block_tables,
    table_width,
    q_row_stride,
    q_head_stride,
    q_dim_stride,
    scale,
    softcap,
    IS_DECODE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    REQUESTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CAREFUL: tl.constexpr,  # once more, where a result is not finite
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Every programs-th chunk of a tile. Grid: KV heads, tiles, programs of a tile."""
    kv_head = tl.program_id(0)
    if IS_DECODE:
        first_row = tl.program_id(1)  # of its request, which has this row or none
        request = first_row
        is_request = request < max_requests
        last_row = tl.load(query_starts + request + 1, mask=is_request, other=0)
        rows = tl.minimum(last_row - first_row, 1)
    else:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)  # those with the most keys first
        request, first_row = _rows_of_tile(tile, query_starts, first_request, max_requests, TILE_ROWS, REQUESTS)
        last_row = tl.load(query_starts + request + 1)
        rows = tl.minimum(last_row - first_row, TILE_ROWS)

    at = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + at % GROUP
    row_of = (first_row + at // GROUP).to(tl.int64)
    is_dim = dims < HEAD_DIM
    to_out = out + (row_of * KV_HEADS * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    if rows <= 0:
        if IS_DECODE and tl.program_id(2) == 0:  # padding
            is_own = (at < GROUP)[:, None] & is_dim[None, :]
            tl.store(to_out, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask=is_own)
        return

    position = tl.load(context_lens + request) - (last_row - first_row)
    begin, end, chunk, num_chunks = _chunks_of_tile(position, rows, window, chunk_limit, HAS_WINDOW, MIN_CHUNK)
    if tl.program_id(2) >= num_chunks:
        return
    is_row = at < rows * GROUP
    is_own = is_row[:, None] & is_dim[None, :]
    if IS_CAREFUL:
        is_finite = tl.abs(tl.load(to_out, mask=is_own, other=0.0).to(tl.float32)) < float("inf")
        if tl.min(tl.min(is_finite.to(tl.int32), 1), 0) == 1:
            return
    from_q = q + (row_of * q_row_stride + heads * q_head_stride)[:, None] + dims[None, :] * q_dim_stride
    q_tile = tl.load(from_q, mask=is_own, other=0.0)
    q_tile = q_tile.to(tl.float32) if UPCAST else q_tile
    positions = position + at // GROUP
    cache = (k_cache, v_cache, block_tables + request.to(tl.int64) * tl.load(table_width), kv_head)
    scoring = (scale, softcap, window)

    for index in range(tl.program_id(2), num_chunks, tl.num_programs(2)):
        first = begin + index * chunk
        last = tl.minimum(first + chunk, end)
        acc, total, top = _attend_chunk(
            first, last, q_tile, positions, position, position + rows - 1, cache, scoring, IS_DECODE, IS_CAREFUL,
            BLOCK_M, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
        if num_chunks == 1:
            if sinks is not None:
                sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
                new_top = tl.maximum(top, sink)
                factor = tl.exp2(top - new_top)
                total = total * factor + tl.exp2(sink - new_top)
                acc = acc * factor[:, None]
            tl.store(to_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_own)
        else:
            part = ((row_of - first_request) * KV_HEADS * GROUP + heads) * max_chunks + index
            tl.store(part_out + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_own)
            tl.store(part_stats + part * 2, top, mask=is_row)
            tl.store(part_stats + part * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["first_request", "max_requests", "window", "chunk_limit", "max_chunks"])
def _join_chunks(
    part_out,
    part_stats,
    out,
    sinks,
    query_starts,
    context_lens,
    first_request,
    max_requests,
    window,
    chunk_limit,
    max_chunks,
    IS_DECODE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    REQUESTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHUNKS: tl.constexpr,  # at least max_chunks
):
    """One head of one row whose tile had several chunks. Grid: heads, rows of the launch. Arguments as above."""
    head = tl.program_id(0)
    row = first_request + tl.program_id(1)
    if IS_DECODE:
        request = row
        is_request = request < max_requests
        first_row = row
        last_row = tl.load(query_starts + request + 1, mask=is_request, other=0)
    else:
        ids = tl.arange(0, REQUESTS)
        starts = tl.load(query_starts + ids, mask=ids < max_requests, other=0)
        request = tl.sum(((ids < max_requests) & (starts <= row)).to(tl.int32), 0) - 1
        start = tl.load(query_starts + request)
        first_row = start + (row - start) // TILE_ROWS * TILE_ROWS
        last_row = tl.load(query_starts + request + 1)
    rows = tl.minimum(last_row - first_row, TILE_ROWS)
    if rows <= 0:
        return
    position = tl.load(context_lens + request) - (last_row - first_row)
    _, _, _, num_chunks = _chunks_of_tile(position, rows, window, chunk_limit, HAS_WINDOW, MIN_CHUNK)
    if num_chunks == 1:
        return
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    dims = tl.arange(0, BLOCK_D)
    part = ((row - first_request).to(tl.int64) * KV_HEADS * GROUP + head) * max_chunks + chunks
    tops = tl.load(part_stats + part * 2, mask=is_chunk, other=float("-inf"))
    totals = tl.load(part_stats + part * 2 + 1, mask=is_chunk, other=0.0)
    top = tl.max(tops, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    factors = tl.exp2(tops - top)
    total = tl.sum(factors * totals, 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    is_read = is_chunk[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(part_out + part[:, None] * HEAD_DIM + dims[None, :], mask=is_read, other=0.0)
    joined = tl.sum(parts * factors[:, None], 0) / total
    to_out = out + (row.to(tl.int64) * KV_HEADS * GROUP + head) * HEAD_DIM + dims
    tl.store(to_out, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
