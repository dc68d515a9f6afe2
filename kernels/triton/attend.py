"""The kernels of Triton's attention: a tile's chunks of keys, and these joined. attention.py launches them."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def attend_tiles(
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
def join_chunks(
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
