"""Times of the kernel backends next to the machine's limits, taken in the same run.

    python -m loadtest.kernel_bench [--backend torch ...] [--dtype bfloat16] [--threads 2] [--rank 16 64]

One line per case: the projection alone (base), its byte floor, each backend, and torch with every segment
on its own. Weights are cold: calls rotate over layers that together exceed the caches. The floor is the
bytes of A and B at the bandwidth that a plain sum reaches. Each time is the best of several rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import DEFAULT_BACKEND, Backend, backends, get_backend
from kernels.torch_backend import plan
from kernels.types import TABLE_COLUMNS, AttentionMetadata, Segments, SiteGroup, SlotWeights
from loadtest.bandwidth import read_bandwidth

COLD_BYTES = 160 << 20
"""Weights that a round goes through: more than a last-level cache holds."""
BLOCK_SIZE = 16


def group_of(in_features: int, *widths: int) -> SiteGroup:
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    return SiteGroup(tuple(range(len(widths))), tuple(offsets), widths, in_features)


SHAPES = {
    "135M qkv": group_of(576, 576, 192, 192),
    "135M o": group_of(576, 576),
    "135M gate-up": group_of(576, 1536, 1536),
    "135M down": group_of(1536, 576),
    "0.5B gate-up": group_of(896, 4864, 4864),
    "0.5B down": group_of(4864, 896),
}


@dataclass(frozen=True)
class Load:
    """Who is in the batch: `distinct` adapters, each with `rows` rows in one segment."""

    name: str
    distinct: int
    rows: int

    @property
    def segments(self) -> Segments:
        starts = [i * self.rows for i in range(self.distinct)]
        ends = [start + self.rows for start in starts]
        return Segments(starts, ends, [((slot + 1, 1.0),) for slot in range(self.distinct)])


LOADS = (
    Load("decode 32 x 1", 32, 1),
    Load("decode 8 x 4", 8, 4),
    Load("decode 1 x 32", 1, 32),
    Load("prefill 1 x 512", 1, 512),
    Load("prefill 4 x 128", 4, 128),
)


def make_layers(group: SiteGroup, slots: int, rank: int, dtype: torch.dtype, count: int) -> list[SlotWeights]:
    """`count` arenas with one image per slot, scattered as after some evictions."""
    return [_make_weights(group, slots, rank, dtype, seed) for seed in range(count)]


def _make_weights(group: SiteGroup, slots: int, rank: int, dtype: torch.dtype, seed: int) -> SlotWeights:
    image = rank * sum(group.in_features + width for width in group.widths)
    table = torch.zeros(slots + 1, len(group.rows), TABLE_COLUMNS, dtype=torch.int64)
    places = random.Random(seed).sample(range(slots), slots)
    for slot in range(1, slots + 1):
        offset = places[slot - 1] * image
        for row, width in enumerate(group.widths):
            up = offset + rank * group.in_features
            table[slot, row] = torch.tensor([offset, up, -1, rank, rank])
            offset = up + rank * width
    return SlotWeights(torch.empty(slots * image, dtype=dtype).normal_(0, 0.02), table)


def best_us(call: Callable[[int], object], count: int, rounds: int = 5) -> float:
    """Microseconds of call(0) ... call(count - 1), each, in the best of several rounds after a warm-up."""
    best = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for i in range(count):
            call(i)
        best = min(best, time.perf_counter() - start)
    return best / count * 1e6


def time_lora(shape: str, load: Load, rank: int, dtype: torch.dtype, names: list[str], bandwidth: float) -> str:
    group, segments = SHAPES[shape], load.segments
    image_bytes = rank * sum(group.in_features + width for width in group.widths) * dtype.itemsize
    count = max(4, min(60, COLD_BYTES // (load.distinct * image_bytes)))
    layers = make_layers(group, load.distinct, rank, dtype, count)
    x = torch.randn(load.distinct * load.rows, group.in_features).to(dtype)
    y = torch.zeros(len(x), sum(group.widths), dtype=dtype)

    def lora(backend: Backend) -> float:
        return best_us(lambda i: backend.segmented_lora(y, x, layers[i], group, segments), count)

    times = {name: lora(get_backend(name)) for name in names}
    if load.distinct > 1 and "torch" in names:
        times["one by one"] = _one_by_one(lambda: lora(get_backend("torch")), layers)
    base_count = max(4, min(60, COLD_BYTES // (x.shape[1] * y.shape[1] * dtype.itemsize)))
    bases = [torch.randn(y.shape[1], x.shape[1]).to(dtype) for _ in range(base_count)]
    base = best_us(lambda i: torch.nn.functional.linear(x, bases[i]), base_count)
    floor = load.distinct * image_bytes / bandwidth * 1e6
    columns = "".join(f"  {name} {us:8.0f} ({us / floor:5.1f}x)" for name, us in times.items())
    return f"{shape:13} {load.name:16} r{rank:<4} base {base:7.0f}  floor {floor:6.0f}{columns}"


def _one_by_one(measure: Callable[[], float], layers: list[SlotWeights]) -> float:
    """`measure` with the torch backend's batching off."""
    kept, plan.MAX_BATCHED_ROWS = plan.MAX_BATCHED_ROWS, 0
    try:
        for weights in layers:
            weights.scratch.clear()
        return measure()
    finally:
        plan.MAX_BATCHED_ROWS = kept


def time_attention(rows: int, context: int, dtype: torch.dtype, names: list[str], bandwidth: float) -> str:
    """32 decode rows, or one request's chunk of `rows` rows, with 9 query and 3 KV heads of 64 (135M)."""
    requests = 32 if rows == 1 else 1
    blocks = -(-context // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(requests * blocks).reshape(requests, blocks) + 1
    shape = (requests * blocks + 1, BLOCK_SIZE, 3, 64)
    kv_bytes = 2 * requests * context * 3 * 64 * dtype.itemsize
    count = max(2, min(30, COLD_BYTES // kv_bytes))
    caches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(count)]
    q = torch.randn(requests * rows, 9, 64).to(dtype)
    meta = AttentionMetadata(
        num_decodes=requests if rows == 1 else 0,
        query_starts=range(0, requests * rows + 1, rows),
        context_lens=[context] * requests,
        block_tables=tables.astype(np.int32),
        slot_mapping=torch.arange(requests * rows),
        block_size=BLOCK_SIZE,
    )

    def attend(backend: Backend) -> float:
        def call(i: int) -> object:
            return backend.paged_attention(q, *caches[i], meta, scale=0.125, sliding_window=None, softcap=None)

        return best_us(call, count)

    floor = kv_bytes / bandwidth * 1e6
    columns = ((name, attend(get_backend(name))) for name in names)
    text = "".join(f"  {name} {us:8.0f} ({us / floor:5.1f}x)" for name, us in columns)
    return f"attention     {requests:2} x {rows:3} rows, context {context:5}   floor {floor:6.0f}{text}"


def report(args: argparse.Namespace) -> Iterator[str]:
    dtype = getattr(torch, args.dtype)
    bandwidth = read_bandwidth()
    threads = torch.get_num_threads()
    yield f"torch {torch.__version__}, {threads} threads, {args.dtype}, {bandwidth / 1e9:.1f} GB/s read; microseconds"
    for rank in args.rank:
        for shape in args.shape:
            for load in LOADS:
                yield time_lora(shape, load, rank, dtype, args.backend, bandwidth)
    for rows, context in ((1, 192), (1, 1024), (128, 128), (256, 1024)):
        yield time_attention(rows, context, dtype, args.backend, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=backends(), default=[DEFAULT_BACKEND])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, help="torch threads; default is torch's own")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for line in report(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
