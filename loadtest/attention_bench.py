"""Attention of the native CPU kernels against the torch backend, layers in turn so that the cache is cold.

    python -m loadtest.attention_bench [--level avx512]

Minima over rounds in which the backends take turns; GB/s counts each visible key and value once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels import torch_backend
from kernels.cpu.attention import PagedAttention
from kernels.cpu.build import load
from kernels.types import AttentionMetadata

BLOCK_SIZE = 16
COLD_BYTES = 256 << 20
"""Keys and values of all layers together: well beyond any cache."""

MODELS = {
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Qwen3-0.6B": (16, 8, 128),
}
"""Query heads, KV heads, head_dim."""

STEPS = {
    "decode 32 x 192": [(192, 1)] * 32,
    "decode 1 x 4096": [(4096, 1)],
    "prefill 512 over 512": [(1024, 512)],
    "prefill 512": [(512, 512)],
}
"""(context, rows) of each request."""


@dataclass(slots=True)
class Case:
    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]  # one pair a layer
    meta: AttentionMetadata
    num_bytes: int  # of the keys and values that one layer's call must read


def make(requests: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int) -> Case:
    blocks = [-(-context // BLOCK_SIZE) for context, _ in requests]
    order = torch.randperm(sum(blocks)).numpy() + 1
    tables = np.zeros((len(requests), max(blocks)), np.int32)
    for i, count in enumerate(blocks):
        tables[i, :count], order = order[:count], order[count:]
    rows = [count for _, count in requests]
    starts = [0, *np.cumsum(rows).tolist()]
    shape = (sum(blocks) + 1, BLOCK_SIZE, kv_heads, head_dim)
    num_bytes = sum(context for context, _ in requests) * kv_heads * head_dim * 4
    layers = max(1, COLD_BYTES // num_bytes)
    caches = [(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()) for _ in range(min(layers, 64))]
    num_decodes = sum(count == 1 for count in rows)
    meta = AttentionMetadata(
        num_decodes, starts, [c for c, _ in requests], tables, torch.zeros(starts[-1], dtype=torch.int64), BLOCK_SIZE
    )
    return Case(torch.randn(starts[-1], heads, head_dim).bfloat16(), caches, meta, num_bytes)


def seconds(attention: Callable[..., torch.Tensor], case: Case) -> float:
    """Of one layer, the mean over all."""
    start = time.perf_counter()
    for k_cache, v_cache in case.caches:
        attention(case.q, k_cache, v_cache, case.meta, scale=0.125, sliding_window=None, softcap=None)
    return (time.perf_counter() - start) / len(case.caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default=None, help="avx512, portable, ... (default: the best)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    library = load(args.level)
    if library is None:
        raise SystemExit("there is no native library here")
    native = PagedAttention(library).paged_attention
    print(f"level {library.level}, {torch.get_num_threads()} threads, a layer's attention in microseconds, minima")
    for model, shape in MODELS.items():
        for name, requests in STEPS.items():
            case = make(requests, *shape)
            times: dict[str, float] = {}
            for _ in range(args.rounds):
                for backend, attention in (("native", native), ("torch", torch_backend.paged_attention)):
                    times[backend] = min(times.get(backend, float("inf")), seconds(attention, case))
            ours, torchs = times["native"], times["torch"]
            rate = case.num_bytes / ours / 1e9
            line = f"{model:14} {name:22} {ours * 1e6:8.0f}  torch {torchs * 1e6:8.0f}  {torchs / ours:5.1f}x"
            print(f"{line}  {rate:5.1f} GB/s")


if __name__ == "__main__":
    main()
