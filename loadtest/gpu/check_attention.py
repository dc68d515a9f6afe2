"""Attention and KV writes of loadtest.gpu.check: caches that are NaN wherever a request has no business."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels import ops
from kernels.types import AttentionMetadata
from loadtest.gpu import oracle
from loadtest.gpu.check_lora import DTYPES, short
from loadtest.gpu.machine import Machine

Requests = list[tuple[int, int]]
"""(context after the step, rows in it) of each request; those with one row come first"""

REQUESTS: dict[str, Requests] = {
    "decodes": [(40, 1), (41, 1), (90, 1), (1, 1), (200, 1), (4097, 1), (16, 1), (1000, 1)],
    "many decodes": [(1 + 37 * i % 700, 1) for i in range(128)],
    "one long decode": [(9000, 1)],
    "prompts": [(64, 64), (300, 150), (1500, 700), (90, 2)],
    "decodes and prompts": [(65, 1), (300, 1), (2, 1), (40, 40), (333, 31), (17, 2)],
}
TINY_REQUESTS: dict[str, Requests] = {
    "decodes": [(9, 1), (1, 1), (20, 1)],
    "decodes and prompts": [(7, 1), (19, 1), (18, 18), (9, 2)],
}
HEADS = ((32, 8, 128), (14, 2, 64), (9, 3, 64), (8, 4, 256), (4, 4, 80), (16, 2, 96))
TINY_HEADS = ((4, 2, 16), (3, 1, 20))
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"sliding_window": 64},
    {"softcap": 5.0, "sinks": True},
    {"sliding_window": 1},
)
BLOCK_SIZES = (16, 16, 32)


@dataclass
class AttentionCase:
    """One call of paged_attention, with the keys and values apart from the caches."""

    q: torch.Tensor  # [rows, heads, head_dim], strided as a packed projection's
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    meta: AttentionMetadata
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def run(self, backend: str, meta: AttentionMetadata | None = None, rows: int | None = None) -> torch.Tensor:
        """The result; `meta` and `rows` as a graph has them, else the case's own."""
        return ops.paged_attention(
            self.q if rows is None else self.q[:rows],
            self.k_cache,
            self.v_cache,
            meta or self.meta,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            sinks=self.sinks,
            backend=backend,
        )

    def expected(self) -> oracle.Expected:
        options = self.scale, self.sliding_window, self.softcap, self.sinks
        return oracle.attention(self.q, self.keys, self.values, self.meta, *options)


@dataclass(frozen=True)
class AttentionRecipe:
    """A case's name and how to make it, anew for each seed."""

    name: str
    requests: Requests
    heads: tuple[int, int, int]  # query heads, KV heads, head_dim
    dtype: torch.dtype
    block_size: int
    options: dict[str, object] = field(default_factory=dict)
    idle_rows: int = 2  # of no request, at the end

    def make(self, machine: Machine, seed: int) -> AttentionCase:
        generator = torch.Generator(machine.device).manual_seed(seed)
        return attention_case(
            self.requests, self.heads, self.dtype, self.block_size, self.options, generator, self.idle_rows
        )


def attention_case(
    requests: Requests,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    block_size: int,
    options: dict[str, object],
    generator: torch.Generator,
    idle_rows: int,
) -> AttentionCase:
    """Random requests in shuffled blocks. Positions outside the contexts are NaN, block 0's too."""
    device = generator.device
    num_heads, kv_heads, head_dim = heads
    tables = block_tables([context for context, _ in requests], block_size, random.Random(generator.initial_seed()))
    caches, kept = [], []
    for _ in range(2):
        cache = torch.full(
            (int(tables.max()) + 2, block_size, kv_heads, head_dim), torch.nan, dtype=dtype, device=device
        )
        own = [
            torch.randn(context, kv_heads, head_dim, device=device, generator=generator).to(dtype)
            for context, _ in requests
        ]
        for table, stored in zip(tables, own, strict=True):
            cache.view(-1, kv_heads, head_dim)[places(table, len(stored), block_size, device)] = stored
        caches.append(cache)
        kept.append(own)
    meta = metadata(requests, tables, block_size, device)
    rows = meta.query_starts[-1] + idle_rows
    packed = torch.randn(rows, num_heads + 2 * kv_heads, head_dim, device=device, generator=generator).to(dtype)
    packed[meta.query_starts[-1] :] = torch.nan
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(num_heads, device=device, generator=generator).to(dtype)
    q, scale = packed[:, :num_heads], 1.5 * head_dim**-0.5
    return AttentionCase(q, caches[0], caches[1], meta, kept[0], kept[1], scale, **options)  # type: ignore[arg-type]


def metadata(requests: Requests, tables: np.ndarray, block_size: int, device: torch.device) -> AttentionMetadata:
    """Of these requests; the rows' own positions are the contexts' last."""
    starts = [0, *itertools.accumulate(rows for _, rows in requests)]
    mapping = [
        places(table, context, block_size, device)[context - rows :]
        for table, (context, rows) in zip(tables, requests, strict=True)
    ]
    decodes = sum(1 for _ in itertools.takewhile(lambda request: request[1] == 1, requests))
    contexts = [context for context, _ in requests]
    return AttentionMetadata(decodes, starts, contexts, tables, torch.cat(mapping), block_size)


def block_tables(contexts: Sequence[int], block_size: int, rng: random.Random) -> np.ndarray:
    """int32 [requests, blocks]: shuffled blocks from 1 up, some in between unused, 0 behind each request's last."""
    counts = [-(-context // block_size) for context in contexts]
    free = rng.sample(range(1, sum(counts) + 4), sum(counts))
    tables = np.zeros((len(contexts), max(counts) + 1), dtype=np.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = [free.pop() for _ in range(count)]
    return tables


def places(table: np.ndarray, context: int, block_size: int, device: torch.device) -> torch.Tensor:
    """int64 [context]: where a request's positions lie in the flat cache."""
    at = np.arange(context)
    return torch.from_numpy(table[at // block_size].astype(np.int64) * block_size + at % block_size).to(device)


def attention_recipes(is_tiny: bool) -> Iterator[AttentionRecipe]:
    """Every batch with every shape of heads, and every dtype with every option and shape; block sizes take turns."""
    requests, heads = (TINY_REQUESTS, TINY_HEADS) if is_tiny else (REQUESTS, HEADS)
    for number, (batch, shape) in enumerate(itertools.product(requests, heads)):
        options = OPTIONS[(number + number // len(heads)) % len(OPTIONS)]
        if is_tiny and "sliding_window" in options:
            options = {"sliding_window": 5}
        dtype = torch.float32 if is_tiny else DTYPES[number // len(DTYPES) % len(DTYPES)]
        size = 4 if is_tiny else BLOCK_SIZES[number % len(BLOCK_SIZES)]
        told = ", ".join(f"{name} {value}" for name, value in options.items()) or "plain"
        name = f"attention {'x'.join(map(str, shape))}, {batch}, {told}, {short(dtype)}"
        yield AttentionRecipe(name, requests[batch], shape, dtype, size, options)


def check_write(machine: Machine, backend: str, rows: int, dtype: torch.dtype, seed: int) -> dict[str, float | bool]:
    """write_kv of strided rows to scattered places, two of them to the dummy block: all else keeps its bits."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    kv_heads, head_dim, block_size = (2, 20, 4) if not machine.is_cuda else (8, 128, 16)
    packed = torch.randn(rows, 4 * kv_heads, head_dim, device=machine.device, generator=generator).to(dtype)
    k, v = packed[:, 2 * kv_heads : 3 * kv_heads], packed[:, 3 * kv_heads :]
    blocks = rows // block_size + 4
    free = torch.randperm((blocks - 1) * block_size, device=machine.device, generator=generator) + block_size
    mapping = free[:rows].clone()
    mapping[-2:] = 3  # both write there, in any order
    caches = [
        torch.full((blocks, block_size, kv_heads, head_dim), torch.nan, dtype=dtype, device=machine.device)
        for _ in range(2)
    ]
    wanted = [cache.clone() for cache in caches]
    for want, new in zip(wanted, (k, v), strict=True):
        want.view(-1, kv_heads, head_dim)[mapping[:-2]] = new[:-2]
    ops.write_kv(k, v, *caches, mapping, backend)
    right = all(oracle.same_bits(cache[1:], want[1:]) for cache, want in zip(caches, wanted, strict=True))
    right &= all(bool(torch.isnan(cache[0, [0, 1, 2]]).all()) for cache in caches)
    return {
        "error": 0.0 if right else float("inf"),
        "off": 0.0 if right else float("inf"),
        "kept": right,
        "right": right,
    }
