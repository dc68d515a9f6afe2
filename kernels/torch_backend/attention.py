"""Attention over the paged cache in plain torch.

    decode rows   one product per group of similar context lengths; shorter ones repeat their last position
    prefill       one request at a time, in tiles of query rows

Both gather the visible positions through token indices that are made once per step and window, so a
position that a request doesn't own is never read, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.types import AttentionMetadata

MAX_DECODE_TOKENS = 8192
"""Positions gathered at once for decode rows: a bound on memory, and they are read while still in cache."""
MIN_DECODE_LENGTH = 64
"""Contexts up to this are padded to one length; longer ones to at most twice their own."""
MAX_TILE_ROWS = 512
"""Query rows of a prefill tile: bounds its mask, and skips the keys after it."""


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows that attend together."""

    rows: torch.Tensor  # int64 [n]
    index: torch.Tensor  # int64 [n * longest]: flat KV positions, all of the row's own and visible to it
    mask: torch.Tensor  # [n, 1, 1, longest] in q's dtype: 0 or -inf


@dataclass(slots=True)
class PrefillTile:
    """Some query rows of a request and the span of its gathered keys that they may see."""

    rows: slice
    keys: slice
    mask: torch.Tensor  # [rows, keys] in q's dtype: 0 or -inf


@dataclass(slots=True)
class PrefillRequest:
    index: torch.Tensor  # int64 [visible positions]
    tiles: list[PrefillTile]


@dataclass(slots=True)
class StepPlan:
    decodes: list[DecodeGroup]
    prefills: list[PrefillRequest]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What happens between q K^T and the softmax."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See kernels/ops.py."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


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
    """See kernels/ops.py. Softcap and sinks run in fp32 throughout; without them scores and softmax are fp32."""
    plan = _plan_of(meta, sliding_window, q)
    scoring = Scoring(scale, softcap, sinks)
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [positions, kv_heads, head_dim]
    heads = (keys.shape[1], q.shape[1] // keys.shape[1])  # KV heads, query heads of each
    out = q.new_zeros(q.shape)
    for group in plan.decodes:
        n = len(group.rows)
        k, v = (t.index_select(0, group.index).unflatten(0, (n, -1)).transpose(1, 2) for t in (keys, values))
        rows = q.index_select(0, group.rows).unflatten(1, heads)  # the heads of a KV head are its query rows
        out.index_copy_(0, group.rows, _attend(rows, k, v, group.mask, scoring, heads_at=1).flatten(1, 2))
    for request in plan.prefills:
        k, v = (t.index_select(0, request.index).transpose(0, 1) for t in (keys, values))
        for tile in request.tiles:
            rows = q[tile.rows].unflatten(1, heads).permute(1, 2, 0, 3)  # [kv_heads, heads of each, rows, head_dim]
            tile_k, tile_v = (t[:, None, tile.keys].expand(-1, heads[1], -1, -1) for t in (k, v))
            attended = _attend(rows, tile_k, tile_v, tile.mask[None, None], scoring, heads_at=0)
            out[tile.rows] = attended.flatten(0, 1).transpose(0, 1)
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scoring: Scoring, heads_at: int
) -> torch.Tensor:
    """q [a, b, m, d] over k, v [a, b, n, d] -> [a, b, m, d]; mask broadcasts over [a, b, m, n].

    The KV heads are dimension `heads_at`, the query heads of each the dimension after it.
    """
    if scoring.softcap is None and scoring.sinks is None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale)
    scores = torch.matmul(q.float() * scoring.scale, k.float().transpose(2, 3))
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view((1,) * heads_at + q.shape[heads_at : heads_at + 2] + (1,) * (2 - heads_at))
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1)[..., : k.shape[2]]
    return torch.matmul(probs, v.float()).to(q.dtype)


def _plan_of(meta: AttentionMetadata, window: int | None, q: torch.Tensor) -> StepPlan:
    """Made at the first layer with this window, reused by the others of the step."""
    key = ("torch", window, q.dtype, q.device)
    plan = meta.scratch.get(key)
    if plan is None:
        contexts = np.asarray(meta.context_lens[: meta.num_decodes], dtype=np.int64)
        starts = np.zeros_like(contexts) if window is None else np.maximum(contexts - window, 0)
        decodes = [_decode_group(rows, contexts, starts, meta, q) for rows in _alike(contexts - starts)]
        prefills = [_prefill(i, meta, window, q) for i in range(meta.num_decodes, len(meta.context_lens))]
        plan = meta.scratch[key] = StepPlan(decodes, prefills)
    return cast(StepPlan, plan)


def _alike(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Decode rows in groups of similar lengths, each within MAX_DECODE_TOKENS after padding."""
    classes = np.ceil(np.log2(np.maximum(lengths, MIN_DECODE_LENGTH))).astype(np.int64)
    for one in np.unique(classes):
        rows = np.flatnonzero(classes == one)
        count = max(1, MAX_DECODE_TOKENS // int(lengths[rows].max()))
        yield from (rows[first : first + count] for first in range(0, len(rows), count))


def _decode_group(
    rows: np.ndarray, contexts: np.ndarray, starts: np.ndarray, meta: AttentionMetadata, q: torch.Tensor
) -> DecodeGroup:
    longest = int((contexts[rows] - starts[rows]).max())
    positions = starts[rows, None] + np.arange(longest)  # [n, longest]
    visible = positions < contexts[rows, None]
    own = np.minimum(positions, contexts[rows, None] - 1)  # padding repeats the row's own last position
    index = torch.from_numpy(_flat_positions(meta.block_tables[rows], own, meta.block_size)).flatten()
    return DecodeGroup(torch.from_numpy(rows).to(q.device), index.to(q.device), _mask(visible, q)[:, None, None])


def _prefill(request: int, meta: AttentionMetadata, window: int | None, q: torch.Tensor) -> PrefillRequest:
    first_row, end_row = meta.query_starts[request], meta.query_starts[request + 1]
    context = meta.context_lens[request]
    start = context - (end_row - first_row)  # position of the first row
    begin = 0 if window is None else max(0, start - window + 1)  # first position that any row sees
    index = _flat_positions(meta.block_tables[request : request + 1], np.arange(begin, context)[None], meta.block_size)
    tiles = []
    for row in range(first_row, end_row, MAX_TILE_ROWS):
        end = min(row + MAX_TILE_ROWS, end_row)
        queries = np.arange(start + row - first_row, start + end - first_row)[:, None]
        low = begin if window is None else max(0, int(queries[0, 0]) - window + 1)
        keys = np.arange(low, int(queries[-1, 0]) + 1)[None]
        visible = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        tiles.append(PrefillTile(slice(row, end), slice(low - begin, keys.shape[1] + low - begin), _mask(visible, q)))
    return PrefillRequest(torch.from_numpy(index[0]).to(q.device), tiles)


def _flat_positions(block_tables: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """int64, shaped as `positions` [n, m]: where position p of request i lies in the cache."""
    blocks = np.take_along_axis(block_tables, positions // block_size, axis=1).astype(np.int64)
    index: np.ndarray = blocks * block_size + positions % block_size
    return index


def _mask(visible: np.ndarray, q: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=q.dtype)
    return mask.masked_fill_(torch.from_numpy(~visible), -torch.inf).to(q.device)
