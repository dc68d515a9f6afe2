"""What loadtest.gpu.kernels times: sets of inputs larger than the last cache, and who works on them.

A set has what a step reads once: weights, inputs, outputs, cached keys. A cold graph goes over all sets, a warm one
over the first again and again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.ops import get_backend
from kernels.types import AttentionMetadata, SiteGroup
from loadtest.gpu import fused, oracle
from loadtest.gpu.adapters import SiteShape, make_adapters, segments_of, spread
from loadtest.gpu.check_attention import Requests, block_tables, metadata
from loadtest.gpu.contestants import cublas_block_diagonal, cublas_by_slice, gather, stacks_of
from loadtest.gpu.machine import Machine
from loadtest.gpu.peers import Peer
from loadtest.gpu.shapes import LLAMA_8B, TINY, Batch, Shape

COLD_CACHES = 3.0  # sets together are at least so many times the last cache
MAX_SETS = 1024
OURS = "ours"

Call = Callable[[int], object]
"""Works on one set."""


@dataclass
class Case:
    """One kernel at one shape."""

    name: str
    num_bytes: int  # that must move
    products: int  # multiply-adds
    launches: int  # of ours, for the goal
    num_sets: int
    calls: dict[str, Call]
    expected: Callable[[], torch.Tensor]  # of set 0, fp64
    result: Callable[[str], torch.Tensor]  # what a contestant makes of set 0
    refused: dict[str, str] = field(default_factory=dict)  # by contestant that can't do it: its error


def num_sets(machine: Machine, set_bytes: int) -> int:
    return int(min(max(2, COLD_CACHES * machine.l2_bytes / set_bytes + 1), MAX_SETS))


def lora_case(
    machine: Machine, backend: str, batch: Batch, dtype: torch.dtype, seed: int, peers: Mapping[str, Peer]
) -> Case:
    """A projection's adapters, with all who can do it."""
    shape = LLAMA_8B if machine.is_cuda else TINY
    generator = torch.Generator(machine.device).manual_seed(seed)
    num_bytes = batch.num_bytes(shape, dtype.itemsize)
    sets = num_sets(machine, num_bytes)
    groups = [_group(shape, batch.projection, first) for first in range(sets)]
    ranks, owners = batch.adapter_ranks, [members[0][0] - 1 for members in spread(batch.rows, batch.distinct)]
    sites = {
        (slot, row): SiteShape(width, group.in_features, rank)
        for group in groups
        for slot, rank in enumerate(ranks, 1)
        for row, width in zip(group.rows, group.widths, strict=True)
    }
    made = make_adapters(sites, len(ranks) + 1, sum(len(group.rows) for group in groups), dtype, generator)
    segments = segments_of(spread(batch.rows, batch.distinct))
    columns = sum(groups[0].widths)
    xs, ys = (
        [torch.randn(batch.rows, width, device=machine.device, generator=generator).to(dtype) for _ in range(sets)]
        for width in (groups[0].in_features, columns)
    )
    before = ys[0].clone()
    own = {OURS: get_backend(backend).segmented_lora}
    if fused.does(batch.rows, max(ranks), dtype):
        own |= fused.contestants(backend)
    calls: dict[str, Call] = {
        name: lambda i, lora=lora: lora(ys[i], xs[i], made.weights, groups[i], segments) for name, lora in own.items()
    }
    makers: dict[str, Callable[..., Callable[[], object] | None]] = {"gather": gather, **peers}
    if batch.distinct == 1:
        makers |= {"cuBLAS a": cublas_by_slice, "cuBLAS b": cublas_block_diagonal}
    stacked = [stacks_of(made, group, ranks, owners) for group in groups]
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            runs = [make(stacks, x, y) for stacks, x, y in zip(stacked, xs, ys, strict=True)]
        except Exception as error:  # another project's code: ours is measured all the same
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        if all(run is not None for run in runs):
            calls[name] = lambda i, runs=runs: runs[i]()

    def result(name: str) -> torch.Tensor:
        ys[0].copy_(before)
        calls[name](0)
        return ys[0].clone()

    def expected() -> torch.Tensor:
        return oracle.lora(before, xs[0], groups[0], segments, made.deltas).exact

    return Case(batch.name, num_bytes, batch.products(shape), 2, sets, calls, expected, result, refused)


def _group(shape: Shape, projection: str, index: int) -> SiteGroup:
    k, widths = shape.projections[projection]
    rows = tuple(range(index * len(widths), (index + 1) * len(widths)))
    return SiteGroup(rows, (0, *itertools.accumulate(widths[:-1])), widths, k)


STEPS: dict[str, Requests] = {
    "decode 32 over 1024": [(1024, 1)] * 32,
    "decode 128 over 512": [(512, 1)] * 128,
    "decode 8 over 8192": [(8192, 1)] * 8,
    "decode 1 over 8192": [(8192, 1)],
    "prefill 1 x 2048": [(2048, 2048)],
    "prefill 8 x 256": [(256, 256)] * 8,
    "prefill 512 over 4096": [(4096, 512)],
    "decode 64 over 512, prefill 512": [(512, 1)] * 64 + [(512, 512)],
}
TINY_STEPS: dict[str, Requests] = {"decode 3 over 20": [(20, 1)] * 3, "prefill 1 x 18": [(18, 18)]}


def attention_case(
    machine: Machine, backend: str, name: str, requests: Requests, dtype: torch.dtype, seed: int
) -> Case:
    """One layer's attention; torch's runs on the same keys lying densely, where all requests are alike."""
    shape = LLAMA_8B if machine.is_cuda else TINY
    generator = torch.Generator(machine.device).manual_seed(seed)
    heads, kv_heads, dims, size = shape.heads, shape.kv_heads, shape.head_dim, 16
    positions, rows = sum(context for context, _ in requests), sum(rows for _, rows in requests)
    num_bytes = dtype.itemsize * dims * (2 * kv_heads * positions + 2 * heads * rows)
    keys = sum(rows * context - rows * (rows - 1) // 2 for context, rows in requests)
    sets = num_sets(machine, num_bytes)
    tables = block_tables([context for context, _ in requests], size, random.Random(seed))
    meta = metadata(requests, tables, size, machine.device)
    qs = [torch.randn(rows, heads, dims, device=machine.device, generator=generator).to(dtype) for _ in range(sets)]
    cache_shape = (int(tables.max()) + 1, size, kv_heads, dims)
    caches = [
        [torch.randn(cache_shape, device=machine.device, generator=generator).to(dtype) for _ in range(2)]
        for _ in range(sets)
    ]
    ours, scale = get_backend(backend).paged_attention, dims**-0.5
    outs = [torch.empty_like(q) for q in qs]

    def attend(i: int) -> torch.Tensor:
        return ours(qs[i], *caches[i], meta, scale=scale, sliding_window=None, softcap=None)

    calls: dict[str, Call] = {OURS: attend}
    if len(set(requests)) == 1 and requests[0][1] in (1, requests[0][0]):
        dense = [_dense(q, cache, meta) for q, cache in zip(qs, caches, strict=True)]
        is_causal = requests[0][1] > 1

        def sdpa(i: int) -> torch.Tensor:
            out = scaled_dot_product_attention(*dense[i], is_causal=is_causal, scale=scale, enable_gqa=True)
            return out.transpose(1, 2).reshape(outs[i].shape)

        calls["torch"] = sdpa

    def expected() -> torch.Tensor:
        stored = [_stored(cache, meta) for cache in caches[0]]
        return oracle.attention(qs[0], *stored, meta, scale, None, None, None).exact

    is_decode = {own == 1 for _, own in requests}
    launches = 2 * (True in is_decode) + (False in is_decode)  # decodes: parts of the contexts, then their sums
    products = 2 * keys * heads * dims
    return Case(
        f"attention {name}", num_bytes, products, launches, sets, calls, expected, lambda name: calls[name](0).clone()
    )


def _stored(cache: torch.Tensor, meta: AttentionMetadata) -> list[torch.Tensor]:
    """Per request [context, kv_heads, head_dim]."""
    tables = torch.from_numpy(meta.block_tables).to(cache.device)
    return [
        cache[tables[i, : -(-context // meta.block_size)].long()].flatten(0, 1)[:context]
        for i, context in enumerate(meta.context_lens)
    ]


def _dense(q: torch.Tensor, cache: list[torch.Tensor], meta: AttentionMetadata) -> list[torch.Tensor]:
    """q, k and v as [requests, heads, positions, head_dim]."""
    requests = len(meta.context_lens)
    k, v = (torch.stack(_stored(part, meta)).transpose(1, 2).contiguous() for part in cache)
    return [q.view(requests, -1, *q.shape[1:]).transpose(1, 2), k, v]


def write_case(machine: Machine, backend: str, rows: int, dtype: torch.dtype, seed: int) -> Case:
    """One layer's KV writes, of slices of a packed projection; torch's are two index_copy."""
    shape = LLAMA_8B if machine.is_cuda else TINY
    generator = torch.Generator(machine.device).manual_seed(seed)
    kv_heads, dims, size = shape.kv_heads, shape.head_dim, 16
    num_bytes = 4 * dtype.itemsize * rows * kv_heads * dims
    sets = num_sets(machine, num_bytes)
    blocks = sets * (rows // size + 2)
    caches = [torch.zeros(blocks, size, kv_heads, dims, dtype=dtype, device=machine.device) for _ in range(2)]
    order = torch.randperm(blocks * size, device=machine.device, generator=generator)
    mappings = [order[i * rows : (i + 1) * rows].contiguous() for i in range(sets)]
    packed = [
        torch.randn(rows, shape.heads + 2 * kv_heads, dims, device=machine.device, generator=generator).to(dtype)
        for _ in range(sets)
    ]
    pairs = [part[:, shape.heads :].split(kv_heads, 1) for part in packed]
    ours, flat = get_backend(backend).write_kv, [cache.view(-1, kv_heads, dims) for cache in caches]

    def torchs(i: int) -> None:
        for cache, new in zip(flat, pairs[i], strict=True):
            cache.index_copy_(0, mappings[i], new)

    calls: dict[str, Call] = {OURS: lambda i: ours(*pairs[i], *caches, mappings[i]), "torch": torchs}

    def result(name: str) -> torch.Tensor:
        for cache in caches:
            cache.zero_()
        calls[name](0)
        return torch.stack([cache[mappings[0]] for cache in flat])

    return Case(f"KV writes {rows} rows", num_bytes, 0, 1, sets, calls, lambda: torch.stack(pairs[0]).double(), result)


def attention_cases(machine: Machine) -> Iterator[tuple[str, Requests]]:
    yield from (STEPS if machine.is_cuda else TINY_STEPS).items()
