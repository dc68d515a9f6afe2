"""The adapters' part of one decode step of model M (the shape of Qwen2.5-0.5B) over all its sites.

    python -m loadtest.lora_bench [--backend cpu torch] [--distinct 32 8 1] [--rank 8 16 32 64] [--rounds 7]

Adapters take the ranks in turn, one row each; every layer has weights of its own, so they come from memory.
The floor is the bytes of all A and B at the bandwidth that a plain sum over 2 GiB reaches in the same run.
"concat" is the padding-free dense form in torch: one product with all A's side by side, a mask, one with all
B's (from copies joined beforehand, which a server would not have).
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels.ops import Backend, backends, get_backend
from kernels.types import BIAS_OFFSET, TABLE_COLUMNS, Segments, SiteGroup, SlotWeights
from loadtest.bandwidth import read_bandwidth

LAYERS = 24
SHAPES = {"qkv": (896, (896, 128, 128)), "o": (896, (896,)), "gate-up": (896, (4864, 4864)), "down": (4864, (896,))}
ELEMENT_ALIGNMENT = 64  # 128 bytes of bf16


@dataclass
class Adapters:
    """Images of `len(ranks)` adapters, scattered over one arena; groups[layer] are that layer's projections."""

    ranks: list[int]
    weights: SlotWeights
    groups: list[list[SiteGroup]]

    @property
    def bytes(self) -> int:
        width = sum(len(widths) * k + sum(widths) for k, widths in SHAPES.values())
        return 2 * LAYERS * width * sum(self.ranks)


def make_groups() -> list[list[SiteGroup]]:
    rows = itertools.count()
    return [[_group(rows, *shape) for shape in SHAPES.values()] for _ in range(LAYERS)]


def _group(rows: Iterator[int], in_features: int, widths: tuple[int, ...]) -> SiteGroup:
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    return SiteGroup(tuple(next(rows) for _ in widths), tuple(offsets), widths, in_features)


def make_adapters(ranks: list[int]) -> Adapters:
    groups = make_groups()
    num_rows = sum(len(group.rows) for layer in groups for group in layer)
    table = torch.zeros(len(ranks) + 1, num_rows, TABLE_COLUMNS, dtype=torch.int64)
    table[:, :, BIAS_OFFSET] = -1
    used = 0
    for slot in random.Random(0).sample(range(1, len(ranks) + 1), len(ranks)):
        rank = ranks[slot - 1]
        for group in itertools.chain(*groups):
            for row, width in zip(group.rows, group.widths, strict=True):
                up = used + _aligned(rank * group.in_features)
                table[slot, row] = torch.tensor([used, up, -1, rank, rank])
                used = up + _aligned(rank * width)
    arena = torch.empty(used, dtype=torch.bfloat16)
    pattern = torch.randn(1 << 20).mul_(0.02).bfloat16()  # drawing a billion numbers would take longer than the rest
    for start in range(0, used, len(pattern)):
        arena[start : start + len(pattern)] = pattern[: used - start]
    return Adapters(ranks, SlotWeights(arena, table), groups)


def _aligned(elements: int) -> int:
    return -(-elements // ELEMENT_ALIGNMENT) * ELEMENT_ALIGNMENT


Call = Callable[[torch.Tensor, torch.Tensor, SiteGroup], None]
"""Adds the deltas of one projection: y, x, group"""


def backend_call(backend: Backend, adapters: Adapters) -> Call:
    count = len(adapters.ranks)
    segments = Segments(list(range(count)), list(range(1, count + 1)), [((slot + 1, 1.0),) for slot in range(count)])
    return lambda y, x, group: backend.segmented_lora(y, x, adapters.weights, group, segments)


def concat_call(adapters: Adapters) -> Call:
    ranks = torch.tensor(adapters.ranks)
    owner = torch.arange(len(ranks)).repeat_interleave(ranks)  # of each rank of the concatenation
    mask = (owner[None] == torch.arange(len(ranks))[:, None]).bfloat16()  # [rows, sum of ranks]
    joined = {group: _joined(adapters, group) for group in itertools.chain(*adapters.groups)}

    def call(y: torch.Tensor, x: torch.Tensor, group: SiteGroup) -> None:
        downs, ups = joined[group]
        v = (x @ downs.T).unflatten(1, (len(group.rows), -1)) * mask[:, None]
        for index, (offset, width) in enumerate(zip(group.offsets, group.widths, strict=True)):
            y[:, offset : offset + width].addmm_(v[:, index], ups[index])

    return call


def _joined(adapters: Adapters, group: SiteGroup) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All A's [slices * sum of ranks, K], and per slice all B's as [sum of ranks, N]."""
    arena, downs, ups = adapters.weights.arena, [], []
    for row, width in zip(group.rows, group.widths, strict=True):
        entries = adapters.weights.table[1:, row].tolist()
        downs += [arena[a : a + rank * group.in_features].view(rank, -1) for a, _, _, rank, _ in entries]
        ups.append(torch.cat([arena[b : b + rank * width].view(width, rank).T for _, b, _, rank, _ in entries]))
    return torch.cat(downs), ups


def best_step_s(calls: dict[str, Call], adapters: Adapters, rounds: int) -> dict[str, float]:
    """Seconds of one step: each layer's projection at its best of `rounds`, summed. The contestants take turns."""
    rows = len(adapters.ranks)
    xs = {k: torch.randn(rows, k).bfloat16() for k, _ in SHAPES.values()}
    ys = {group.widths: torch.zeros(rows, sum(group.widths), dtype=torch.bfloat16) for group in adapters.groups[0]}
    sites = list(itertools.chain(*adapters.groups))
    best = {name: [float("inf")] * len(sites) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for i, group in enumerate(sites):
                start = time.perf_counter()
                call(ys[group.widths], xs[group.in_features], group)
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    return {name: sum(times) for name, times in best.items()}


def report(args: argparse.Namespace) -> Iterator[str]:
    bandwidth = read_bandwidth(2 << 30)
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s read"
    for distinct in args.distinct:
        for ranks in [args.rank] if distinct > 1 else [[rank] for rank in args.rank]:
            adapters = make_adapters([ranks[i % len(ranks)] for i in range(distinct)])
            calls = {name: backend_call(get_backend(name), adapters) for name in args.backend}
            if args.concat:
                calls["concat"] = concat_call(adapters)
            best = best_step_s(calls, adapters, args.rounds)
            floor = adapters.bytes / bandwidth
            columns = "".join(f"  {name} {s * 1e3:7.2f} ms ({s / floor:5.2f}x)" for name, s in best.items())
            load = f"{distinct:3} distinct, rank {'/'.join(map(str, ranks)):11} {adapters.bytes / 1e6:7.1f} MB"
            yield f"{load}  floor {floor * 1e3:6.2f} ms{columns}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", nargs="+", choices=backends(), default=[name for name in backends() if name != "reference"]
    )
    parser.add_argument("--distinct", nargs="+", type=int, default=[32, 8, 1])
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concat", action="store_true", help="the dense form in torch as well (twice the memory)")
    parser.add_argument("--threads", type=int, help="torch threads; default is torch's own")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for line in report(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
