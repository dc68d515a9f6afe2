"""The normative backend: what each op means, in fp32, one loop after the other. Slow and plain on purpose.

Every other backend is done when it passes the suite in tests/kernels against this one. The contracts
(shapes, dtypes, errors) stand in kernels/ops.py.
"""

from __future__ import annotations

import torch

from kernels.sites import Site, read_site
from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    """y[rows of s, slice i] += sum_m w_m (B_m (A_m x) + bias_m)."""
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        for row, offset, width in zip(group.rows, group.offsets, group.widths, strict=True):
            sites = _present(weights, members, row, group.in_features, width)
            if sites:
                down = [x[start:end].float() @ site.a.float().T for _, site in sites]
                _add(y[start:end, offset : offset + width], down, sites)


def segmented_embedding(y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments) -> None:
    """y[t] += sum_m w_m (B_m A_m[ids[t]] + bias_m)."""
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        sites = _present(weights, members, row, 0, y.shape[1])
        if sites:
            _add(y[start:end], [site.a[ids[start:end]].float() for _, site in sites], sites)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """cache[position of row t] = row t."""
    block_size = k_cache.shape[1]
    for row, position in enumerate(slot_mapping.tolist()):
        k_cache[position // block_size, position % block_size] = k[row]
        v_cache[position // block_size, position % block_size] = v[row]


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
    """out[t] = softmax(softcap(scale q K^T), sinks) V over the keys that row t sees, one row at a time."""
    out = q.new_zeros(q.shape)  # contiguous, whatever the strides of q
    repeats = q.shape[1] // k_cache.shape[2]  # query heads per KV head
    for request, context in enumerate(meta.context_lens):
        keys = _gathered(k_cache, meta, request).repeat_interleave(repeats, 1)  # [context, heads, head_dim]
        values = _gathered(v_cache, meta, request).repeat_interleave(repeats, 1)
        first, end = meta.query_starts[request], meta.query_starts[request + 1]
        for row in range(first, end):
            last = context - (end - row)  # the row's own position
            begin = 0 if sliding_window is None else max(0, last - sliding_window + 1)
            scores = torch.einsum("hd,khd->hk", q[row].float(), keys[begin : last + 1]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:  # one more logit per head, whose probability goes nowhere
                scores = torch.cat([scores, sinks.float()[:, None]], 1)
            probs = scores.softmax(-1)[:, : last + 1 - begin]
            out[row] = torch.einsum("hk,khd->hd", probs, values[begin : last + 1])
    return out


def _present(
    weights: SlotWeights, members: tuple[tuple[int, float], ...], row: int, in_features: int, width: int
) -> list[tuple[float, Site]]:
    """The members that have this site, with their weights."""
    read = ((w, read_site(weights.arena, weights.table[s, row].tolist(), in_features, width)) for s, w in members)
    return [(weight, site) for weight, site in read if site is not None]


def _add(y: torch.Tensor, down: list[torch.Tensor], sites: list[tuple[float, Site]]) -> None:
    """y += sum of w (B v + bias), summed in fp32 and cast once."""
    total = y.to(torch.float32, copy=True)
    for v, (weight, site) in zip(down, sites, strict=True):
        total += weight * (v @ site.b.float().T)
        if site.bias is not None:
            total += weight * site.bias.float()
    y.copy_(total)


def _gathered(cache: torch.Tensor, meta: AttentionMetadata, request: int) -> torch.Tensor:
    """fp32 [context, kv_heads, head_dim]: a request's positions, one at a time through its block table."""
    places = (divmod(position, meta.block_size) for position in range(meta.context_lens[request]))
    return torch.stack([cache[int(meta.block_tables[request, block]), at] for block, at in places]).float()
