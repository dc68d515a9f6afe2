"""Arenas, tables, segments and caches made by popularity, rank profile, dtype, shape and phase.

Whatever a kernel has no business reading is NaN: the arena outside the tensors, rows of no segment (in x
and y), columns of no slice, KV positions outside a request's context. The oracles take fp64 copies of what
was stored, never the table.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.types import TABLE_COLUMNS, AttentionMetadata, Segments, SiteGroup, SlotWeights

ALIGNMENT_BYTES = 128
RANK_PADDING = 8

POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed", "base-mixed", "sets")
RANKS = {
    "all-16": (16,),
    "ragged": (1, 3, 8, 13, 24, 64),
    "wide": (512, 1, 200, 8),
    "alike": (8, 16, 8),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "single": SiteGroup(rows=(1,), offsets=(0,), widths=(96,), in_features=64),
    "qkv": SiteGroup(rows=(0, 2, 5), offsets=(0, 192, 256), widths=(192, 64, 64), in_features=128),
    "gate-up": SiteGroup(rows=(3, 4), offsets=(0, 136), widths=(136, 136), in_features=48),
    "with gaps": SiteGroup(rows=(4, 1), offsets=(5, 90), widths=(50, 33), in_features=70),
    "down": SiteGroup(rows=(0,), offsets=(0,), widths=(128,), in_features=1536),
}
PHASES = ("prefill", "decode", "mixed")


def pairwise(**factors: Sequence[object]) -> Iterator[dict[str, object]]:
    """Combinations such that every pair of values of two factors occurs together at least once (greedy)."""
    names = list(factors)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rng = random.Random(0)
    while missing:
        seed = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        tries = ({name: seed.get(name, rng.choice(factors[name])) for name in names} for _ in range(60))
        best = max(tries, key=lambda case: len(missing & _pairs_of(case)))
        missing -= _pairs_of(best)
        yield best


def _pairs_of(case: dict[str, object]) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


@dataclass(frozen=True)
class Dense:
    """One adapter's delta at one site in fp64, of the values that were stored."""

    a: torch.Tensor  # [r, K]; of an embedding [V, r]
    b: torch.Tensor  # [N, r]
    bias: torch.Tensor | None  # [N]


@dataclass
class ArenaBuilder:
    """Puts sites at aligned places of one arena, NaN between them, and keeps what it put there in fp64."""

    dtype: torch.dtype
    num_slots: int
    num_rows: int = 8
    seed: int = 0
    dense: dict[tuple[int, int], Dense] = field(default_factory=dict)  # (slot, row) -> delta

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.seed)
        self.table = torch.zeros(self.num_slots, self.num_rows, TABLE_COLUMNS, dtype=torch.int64)
        self.table[:, :, 2] = -1
        self.parts: list[torch.Tensor] = []
        self.used = 0

    def add(
        self, slot: int, row: int, width: int, in_features: int, rank: int, bias: bool = False, vocab: int = 0
    ) -> None:
        """A site with normal weights: a linear's, or with `vocab` an embedding's."""
        padded = -(-rank // RANK_PADDING) * RANK_PADDING
        a = self._normal(vocab or rank, rank if vocab else in_features) * (1.0 if vocab else in_features**-0.5)
        b = self._normal(width, rank) * max(rank, 1) ** -0.5
        a, b = a.to(self.dtype), b.to(self.dtype)
        beta = self._normal(width).to(self.dtype) if bias else None
        entry = self.table[slot, row]
        entry[3], entry[4] = rank, padded
        if rank:
            entry[0] = self._put(_pad(a, padded, 1 if vocab else 0))
            entry[1] = self._put(_pad(b, padded, 1))
        entry[2] = -1 if beta is None else self._put(beta)
        self.dense[slot, row] = Dense(a.double(), b.double(), None if beta is None else beta.double())

    def weights(self) -> SlotWeights:
        tail = torch.full((999,), torch.nan, dtype=self.dtype)
        return SlotWeights(torch.cat([*self.parts, tail]), self.table.clone())

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def _put(self, tensor: torch.Tensor) -> int:
        """The offset of a copy of `tensor`, after a NaN gap that ends at an aligned place."""
        align = ALIGNMENT_BYTES // tensor.element_size()
        gap = -self.used % align + align
        self.parts += [torch.full((gap,), torch.nan, dtype=self.dtype), tensor.flatten()]
        start = self.used + gap
        self.used = start + tensor.numel()
        return start


def _pad(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    shape = [missing if axis == dim else length for axis, length in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


@dataclass
class LoraCase:
    """One call of segmented_lora with its oracle."""

    weights: SlotWeights
    group: SiteGroup
    segments: Segments
    x: torch.Tensor  # [rows, K]; NaN in rows of no segment
    y: torch.Tensor  # [rows, columns]; NaN where nothing may be read or written
    dense: dict[tuple[int, int], Dense]

    def exact(self) -> torch.Tensor:
        """fp64 [rows, columns]: what y should become."""
        total = self.y.double()
        for rows, columns, weight, site in self._deltas():
            total[rows, columns] += weight * (self.x[rows].double() @ site.a.T @ site.b.T)
            if site.bias is not None:
                total[rows, columns] += weight * site.bias
        return total

    def bound(self, rounds_v: bool = True) -> torch.Tensor:
        """fp64 [rows, columns]: how far rounding may take a result from `exact`.

        One rounding of the result and, unless `rounds_v` is False, one of v = A x and one of each member's
        B v (with slack 2); fp32 sums over K, the rank and the members.
        """
        exact = self.exact().abs()
        rounded, summed = torch.zeros_like(exact), torch.zeros_like(exact)
        for rows, columns, weight, site in self._deltas():
            x = self.x[rows].double()
            rounded[rows, columns] += abs(weight) * ((x @ site.a.T).abs() @ site.b.abs().T)
            summed[rows, columns] += abs(weight) * (x.abs() @ site.a.abs().T @ site.b.abs().T)
            if site.bias is not None:
                summed[rows, columns] += abs(weight) * site.bias.abs()
        u, u32 = torch.finfo(self.y.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        terms = 4 * (self.group.in_features + 512) ** 0.5  # of a sum over K, then over the rank
        tiny = torch.finfo(self.y.dtype).tiny * u * 4  # gradual underflow of v and y (fp16)
        return 1.01 * u * exact + 4 * u * rounded * rounds_v + terms * u32 * (summed + exact) + tiny

    def touched(self) -> torch.Tensor:
        """bool [rows, columns]: where a delta belongs."""
        touched = torch.zeros(self.y.shape, dtype=torch.bool)
        for rows, columns, row, members in self._parts():
            if any((slot, row) in self.dense for slot, _ in members):
                touched[rows, columns] = True
        return touched

    def _deltas(self) -> Iterator[tuple[slice, slice, float, Dense]]:
        for rows, columns, row, members in self._parts():
            for slot, weight in members:
                if (slot, row) in self.dense:
                    yield rows, columns, weight, self.dense[slot, row]

    def _parts(self) -> Iterator[tuple[slice, slice, int, tuple[tuple[int, float], ...]]]:
        group, s = self.group, self.segments
        for start, end, members in zip(s.starts, s.ends, s.members, strict=True):
            for row, offset, width in zip(group.rows, group.offsets, group.widths, strict=True):
                yield slice(start, end), slice(offset, offset + width), row, members


def lora_case(popularity: str, ranks: str, dtype: torch.dtype, shape: str, phase: str, seed: int = 0) -> LoraCase:
    rng = random.Random(f"{popularity} {ranks} {dtype} {shape} {phase} {seed}")
    group = SHAPES[shape]
    lengths = request_lengths(phase, rng)
    choice = members_of(popularity, len(lengths), rng)
    segments, rows = segments_of(lengths, choice, phase, rng, is_shuffled=popularity == "base-mixed")
    slots = sorted({slot for members in choice for slot, _ in members})
    builder = ArenaBuilder(dtype, num_slots=max(slots, default=0) + 2, seed=rng.randrange(1 << 30))
    for slot in rng.sample(slots, len(slots)):
        _add_adapter(builder, group, slot, RANKS[ranks][slot % len(RANKS[ranks])], rng)
    generator = torch.Generator().manual_seed(seed)
    columns = group.offsets[-1] + group.widths[-1] + 7
    x = torch.randn(rows, group.in_features, generator=generator).to(dtype)
    y = torch.randn(rows, columns, generator=generator).to(dtype)
    case = LoraCase(builder.weights(), group, segments, x, y, builder.dense)
    case.y[~case.touched()] = torch.nan
    in_segment = torch.zeros(rows, dtype=torch.bool)
    for start, end in zip(segments.starts, segments.ends, strict=True):
        in_segment[start:end] = True
    case.x[~in_segment] = torch.nan
    return case


def _add_adapter(builder: ArenaBuilder, group: SiteGroup, slot: int, rank: int, rng: random.Random) -> None:
    """Mostly whole; every fourth slot lacks a slice, has biases, or is only a bias somewhere."""
    for index, (row, width) in enumerate(zip(group.rows, group.widths, strict=True)):
        kind = rng.choice(["absent", "bias", "only bias", "half"]) if slot % 4 == 3 else "whole"
        if kind == "absent" and index == 0:
            continue
        site_rank = {"only bias": 0, "half": -(-rank // 2)}.get(kind, rank)
        builder.add(slot, row, width, group.in_features, site_rank, bias=kind in ("bias", "only bias"))


def request_lengths(phase: str, rng: random.Random) -> list[int]:
    """Rows of each request: decodes first, then prefill chunks."""
    decodes = [1] * rng.randint(18, 26) if phase != "prefill" else []
    chunks = [rng.choice([1, 2, 5, 17, 40]) for _ in range(5)] + [5, 5] if phase != "decode" else []
    return decodes + chunks


def members_of(popularity: str, count: int, rng: random.Random) -> list[tuple[tuple[int, float], ...]]:
    """The member list of each of `count` requests; () is the base."""
    if popularity == "sets":
        return [_weighted_set(rng) for _ in range(count)]
    slots = {
        "identical": lambda: [2] * count,
        "distinct": lambda: rng.sample(range(1, count + 1), count),
        "uniform": lambda: [rng.randint(1, 8) for _ in range(count)],
        "zipf": lambda: rng.choices(range(1, 13), [1 / n for n in range(1, 13)], k=count),
        "skewed": lambda: [1 if rng.random() < 0.8 else rng.randint(2, 12) for _ in range(count)],
        "base-mixed": lambda: [0 if n % 2 else rng.randint(1, 6) for n in range(count)],
    }[popularity]()
    return [((slot, 1.0),) if slot else () for slot in slots]


def _weighted_set(rng: random.Random) -> tuple[tuple[int, float], ...]:
    """One to three members; weights of either sign; sometimes a plain adapter or the base."""
    count = rng.choice([0, 1, 2, 3])
    slots = rng.sample(range(1, 9), count)
    return tuple((slot, rng.choice([1.0, 0.5, -0.75, 1.3])) for slot in slots)


def segments_of(
    lengths: Sequence[int],
    choice: Sequence[tuple[tuple[int, float], ...]],
    phase: str,
    rng: random.Random,
    is_shuffled: bool = False,
) -> tuple[Segments, int]:
    """Rows ordered by (decode | prefill, members), as a batch orders them, or shuffled; runs become segments."""
    num_decodes = 0 if phase == "prefill" else len(lengths) - (7 if phase == "mixed" else 0)
    requests = list(range(len(lengths)))
    if is_shuffled:
        rng.shuffle(requests)
    else:
        requests.sort(key=lambda i: (i >= num_decodes, choice[i]))
    segments, row = Segments(), 0
    for members, run in itertools.groupby(requests, key=lambda i: choice[i]):
        count = sum(lengths[i] for i in run)
        if members:
            segments.starts.append(row)
            segments.ends.append(row + count)
            segments.members.append(members)
        row += count
    return segments, row


@dataclass
class AttentionCase:
    """One call of paged_attention with its oracle's inputs, kept apart from the cache."""

    q: torch.Tensor  # [rows, heads, head_dim]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    meta: AttentionMetadata
    keys: list[torch.Tensor]  # per request [context, kv_heads, head_dim], fp64
    values: list[torch.Tensor]
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def options(self) -> dict[str, object]:
        names = ("scale", "sliding_window", "softcap", "sinks")
        return {name: getattr(self, name) for name in names}

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 [rows, heads, head_dim]: the result, and the softmax's sum of |v| that bounds its error."""
        out, magnitude = torch.zeros(2, *self.q.shape, dtype=torch.float64)
        for i, context in enumerate(self.meta.context_lens):
            rows = slice(self.meta.query_starts[i], self.meta.query_starts[i + 1])
            q = self.q[rows].double()
            repeats = q.shape[1] // self.keys[i].shape[1]
            k, v = (t.repeat_interleave(repeats, 1) for t in (self.keys[i], self.values[i]))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            at, key = torch.arange(context - len(q), context)[:, None], torch.arange(context)[None]
            hidden = key > at
            if self.sliding_window is not None:
                hidden |= key <= at - self.sliding_window
            scores = scores.masked_fill(hidden, -torch.inf)
            sink = 0.0 if self.sinks is None else self.sinks.double().exp()[:, None, None]
            weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sink)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
            magnitude[rows] = torch.einsum("hqk,khd->qhd", weights, v.abs())
        return out, magnitude


CONTEXTS = {
    "short": ([3, 7, 1, 16, 12], [(6, 6), (9, 2)]),
    "ragged": ([1, 2, 65, 300, 33, 128, 130, 64, 5], [(40, 40), (200, 31), (17, 1)]),
    "decode": ([40, 41, 90, 12, 200, 7, 1], []),
    "prefill": ([], [(64, 64), (1, 1), (250, 150), (90, 8)]),
}
"""Profile -> contexts of the decode rows, and (context, rows in this step) of the prefill chunks."""


def attention_case(
    contexts: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int] = (6, 2, 16),
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    seed: int = 0,
) -> AttentionCase:
    """heads: query heads, KV heads, head_dim. Every cache position outside the contexts is NaN, block 0's too."""
    decodes, chunks = CONTEXTS[contexts]
    lengths = decodes + [context for context, _ in chunks]
    counts = [1] * len(decodes) + [rows for _, rows in chunks]
    rng = torch.Generator().manual_seed(seed)
    num_heads, kv_heads, head_dim = heads
    num_blocks = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(num_blocks) + 3, generator=rng) + 1).tolist()  # shuffled, some left unused
    tables = np.zeros((len(lengths), max(num_blocks) + 1), dtype=np.int32)
    shape = (len(order) + 1, block_size, kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    keys, values, mapping = [], [], []
    for i, length in enumerate(lengths):
        tables[i, : num_blocks[i]] = [order.pop() for _ in range(num_blocks[i])]
        where = [int(tables[i, p // block_size]) * block_size + p % block_size for p in range(length)]
        for cache, kept in ((k_cache, keys), (v_cache, values)):
            stored = torch.randn(length, kv_heads, head_dim, generator=rng).to(dtype)
            cache.view(-1, kv_heads, head_dim)[where] = stored
            kept.append(stored.double())
        mapping += where[length - counts[i] :]
    starts = [0, *itertools.accumulate(counts)]
    meta = AttentionMetadata(len(decodes), starts, lengths, tables, torch.tensor(mapping), block_size)
    q = (
        torch.randn(num_heads, starts[-1], head_dim, generator=rng).to(dtype).transpose(0, 1)
    )  # strided, as models give it
    sinks = torch.randn(num_heads, generator=rng).to(dtype) if has_sinks else None
    scale = 1.5 * head_dim**-0.5
    return AttentionCase(q, k_cache, v_cache, meta, keys, values, scale, window, softcap, sinks)
