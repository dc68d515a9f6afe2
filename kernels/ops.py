"""The kernel interface: four ops, each with its contract, and the backends that implement them.

    segmented_lora       y += each segment's low-rank delta        linears, heads
    segmented_embedding  y += each segment's low-rank delta        embeddings
    write_kv             rows into the paged KV cache
    paged_attention      causal attention over the paged KV cache

The functions here check their arguments and dispatch; the engine takes a backend once, with `get_backend`,
and calls that. What is checked here is what a backend may take for granted. A site is absent for a member
when its table entry has rank 0 and bias offset -1: that member adds nothing there.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from kernels.types import TABLE_COLUMNS, AttentionMetadata, Segments, SiteGroup, SlotWeights

DEFAULT_BACKEND = "torch"

MODULES = {
    "reference": "kernels.reference",
    "torch": "kernels.torch_backend",
    "cpu": "kernels.cpu",
    "triton": "kernels.triton",
    "cuda": "kernels.cuda",
}
"""Name -> module with the four functions. A native backend adds its line here and passes tests/kernels.
A module that can't run everywhere says by `is_available()` whether it does here."""


class Backend(Protocol):
    """The four ops as a backend offers them; the contracts are those of the functions below."""

    def segmented_lora(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None: ...

    def segmented_embedding(
        self, y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments
    ) -> None: ...

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def get_backend(name: str = DEFAULT_BACKEND) -> Backend:
    """The backend called `name`. Raises ValueError for a name that there is not, or not on this machine."""
    if name not in MODULES:
        raise ValueError(f"unknown kernel backend {name!r}; there are {', '.join(sorted(MODULES))}")
    if not _is_available(name):
        raise ValueError(f"the kernel backend {name!r} does not run on this machine (the log says why); torch does")
    return cast(Backend, importlib.import_module(MODULES[name]))


def backends() -> tuple[str, ...]:
    """The names that `get_backend` knows and this machine runs. Builds the native kernels if they aren't yet."""
    return tuple(name for name in MODULES if _is_available(name))


def _is_available(name: str) -> bool:
    check = getattr(importlib.import_module(MODULES[name]), "is_available", None)
    return check is None or bool(check())


def segmented_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: SlotWeights,
    group: SiteGroup,
    segments: Segments,
    backend: str = DEFAULT_BACKEND,
) -> None:
    """Add each segment's delta to a packed projection's output, in place.

        y[rows of s, slice i] = round(y + sum_m w_m (B_m (A_m x) + bias_m))

    (alpha / r is in B already; w_m is the member's own weight in its set, 1 for a single adapter)

    y        [rows, at least sum of N], x [rows, K]: the arena's dtype, contiguous in the last dimension
    group    which table rows the slices read, and where they lie in y
    segments ascending, disjoint, within the rows; members' slots are resident; zero length is legal

    fp32 accumulation over K, rank and members; one writer per tile of y. Rows in no segment, columns in
    no slice and sites absent for every member are neither read nor written: NaN there stays, bit for bit,
    and reaches nothing else. The same arguments give the same bits. Raises ValueError for shapes, dtypes
    or segments that don't fit.
    """
    _check_segments(y, weights, segments)
    if x.ndim != 2 or x.shape[1] != group.in_features or len(x) != len(y) or x.dtype != y.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}; y {tuple(y.shape)} {y.dtype} and K = {group.in_features} "
            f"need {(len(y), group.in_features)} {y.dtype}"
        )
    if x.stride(-1) != 1:
        raise ValueError("x must be contiguous in its last dimension")
    ends = [offset + width for offset, width in zip(group.offsets, group.widths, strict=True)]
    if max(ends) > y.shape[1] or max(group.rows) >= weights.table.shape[1]:
        raise ValueError(f"{group} does not fit y {tuple(y.shape)} and table {tuple(weights.table.shape)}")
    get_backend(backend).segmented_lora(y, x, weights, group, segments)


def segmented_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: SlotWeights,
    row: int,
    segments: Segments,
    backend: str = DEFAULT_BACKEND,
) -> None:
    """Add each segment's delta to an embedding's output, in place: y[t] += sum_m w_m B_m A_m[ids[t]].

    y   [rows, hidden], the arena's dtype, contiguous in the last dimension
    ids int64 [rows], each below the vocabulary size (not checked: the table doesn't know it)
    row the embedding's row in the table; its A is [V, padded rank]

    All else as in `segmented_lora`.
    """
    _check_segments(y, weights, segments)
    if ids.ndim != 1 or len(ids) != len(y) or ids.dtype != torch.int64:
        raise ValueError(f"ids are {tuple(ids.shape)} {ids.dtype}; y needs ({len(y)},) torch.int64")
    if not 0 <= row < weights.table.shape[1]:
        raise ValueError(f"row {row} is not in a table of {weights.table.shape[1]} rows")
    get_backend(backend).segmented_embedding(y, ids, weights, row, segments)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    backend: str = DEFAULT_BACKEND,
) -> None:
    """Store each row's key and value at its place in the cache.

    k, v             [rows, kv_heads, head_dim], any strides, the caches' dtype
    k_cache, v_cache [blocks, block_size, kv_heads, head_dim], contiguous
    slot_mapping     int64 [rows], block * block_size + offset, all different; rows that belong to nobody
                     (padding of a captured graph) go to block 0, the dummy block, in any order

    Raises ValueError for shapes or dtypes that don't fit.
    """
    if not k.shape == v.shape == (len(slot_mapping), *k_cache.shape[2:]) or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} don't fit caches {tuple(k_cache.shape)}, "
            f"{tuple(v_cache.shape)} and {len(slot_mapping)} slots"
        )
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype or slot_mapping.dtype != torch.int64:
        raise ValueError("k, v and the caches need one dtype, slot_mapping int64")
    get_backend(backend).write_kv(k, v, k_cache, v_cache, slot_mapping)


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
    backend: str = DEFAULT_BACKEND,
) -> torch.Tensor:
    """Causal attention of every row over its own request's cached keys, the row's own included.

    q                [rows, heads, head_dim], any strides; query head h reads KV head h * kv_heads // heads
    k_cache, v_cache [blocks, block_size, kv_heads, head_dim], contiguous, q's dtype
    sliding_window   a row at position p sees keys in (p - window, p]; None: in [0, p]
    softcap          scores become softcap * tanh(scores / softcap)
    sinks            [heads]: one more logit in each softmax, whose probability goes to no value

    Returns a contiguous [rows, heads, head_dim] in q's dtype; rows of no request are zeros. The softmax is
    fp32. What lies in the cache beyond a request's context, before a row's window, or in blocks that are not
    its own (the dummy block 0 too), may be NaN and influences nothing. Raises ValueError for shapes or
    dtypes that don't fit.
    """
    if q.ndim != 3 or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache {tuple(k_cache.shape)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype or k_cache.shape != v_cache.shape:
        raise ValueError("q and the caches need one dtype, the caches one shape")
    requests = len(meta.context_lens)
    if len(meta.query_starts) != requests + 1 or meta.query_starts[-1] > len(q) or meta.num_decodes > requests:
        raise ValueError(f"{requests} requests, query starts {list(meta.query_starts)} and {len(q)} rows don't fit")
    if max(meta.context_lens, default=0) > meta.block_tables.shape[1] * meta.block_size:
        raise ValueError(f"a context is longer than {meta.block_tables.shape[1]} blocks of {meta.block_size}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks are {tuple(sinks.shape)}, not ({q.shape[1]},)")
    return get_backend(backend).paged_attention(
        q, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def _check_segments(y: torch.Tensor, weights: SlotWeights, segments: Segments) -> None:
    if y.ndim != 2 or y.dtype != weights.arena.dtype or y.stride(-1) != 1:
        raise ValueError(f"y must be 2-D {weights.arena.dtype} with contiguous rows, not {tuple(y.shape)} {y.dtype}")
    assert weights.table.shape[2] == TABLE_COLUMNS
    done = 0
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        if not done <= start <= end:
            raise ValueError(f"segment {start}:{end} is not ascending after row {done}")
        done = end
        bad = [slot for slot, _ in members if not 0 < slot < len(weights.table)]
        if bad:
            raise ValueError(
                f"segment {start}:{end} names slots {bad} of a table of {len(weights.table)}; 0 is no adapter"
            )
    if done > len(y):
        raise ValueError(f"the segments end at row {done} of {len(y)}")
