"""The model whose shapes are measured, and which batches of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder as its kernels see it; projections are (K, N of each slice)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def projections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate-up": (self.hidden, (self.intermediate,) * 2),
            "down": (self.intermediate, (self.hidden,)),
        }

    @property
    def matrix_elements(self) -> int:
        """Weights that a step multiplies by: all but the embedding, and the norms, which are nothing."""
        layer = sum(k * sum(widths) for k, widths in self.projections.values())
        return self.layers * layer + self.vocab * self.hidden

    @property
    def kv_elements(self) -> int:
        """Of a position, keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14_336, 128_256)
TINY = Shape(2, 64, 4, 2, 16, 96, 120)

RAGGED = (8, 16, 24, 32, 40, 64, 128, 16)
"""Ranks of adapters in turn"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one projection, spread over so many adapters of these ranks in turn."""

    projection: str
    rows: int
    distinct: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        ranks = str(self.ranks[0]) if len(self.ranks) == 1 else "ragged"
        return f"{self.projection} {self.rows} rows of {self.distinct}, rank {ranks}"

    @property
    def adapter_ranks(self) -> list[int]:
        """By slot, from slot 1 on."""
        return [self.ranks[i % len(self.ranks)] for i in range(self.distinct)]

    def num_bytes(self, shape: Shape, item_bytes: int) -> int:
        """The fewest that must move: each adapter's matrices and x read once, y read and written."""
        k, widths = shape.projections[self.projection]
        weights = sum(self.adapter_ranks) * (len(widths) * k + sum(widths))
        return item_bytes * (weights + self.rows * k + 2 * self.rows * sum(widths))

    def products(self, shape: Shape) -> int:
        """Multiply-adds."""
        k, widths = shape.projections[self.projection]
        ranks = self.adapter_ranks
        own = sum(ranks[row * self.distinct // self.rows] for row in range(self.rows))
        return own * (len(widths) * k + sum(widths))


def batches(is_tiny: bool) -> Iterator[Batch]:
    """About fifty, those that decide a decode step first."""
    if is_tiny:
        yield from (Batch("qkv", 3, 1, (16,)), Batch("qkv", 4, 4, (8, 16, 3)), Batch("down", 20, 2, (16,)))
        return
    decode: Sequence[tuple[int, int, tuple[int, ...]]] = (
        (32, 1, (16,)),
        (32, 8, (16,)),
        (32, 32, (16,)),
        (32, 32, (64,)),
        (32, 32, RAGGED),
        (1, 1, (16,)),
        (128, 1, (16,)),
        (128, 32, (16,)),
        (128, 128, (16,)),
        (2048, 1, (16,)),
        (2048, 8, (16,)),
        (2048, 32, (16,)),
    )
    for rows, distinct, ranks in decode:
        for projection in LLAMA_8B.projections:
            yield Batch(projection, rows, distinct, ranks)
    for rows, distinct, ranks in (
        (8, 8, (8,)),
        (32, 32, (8,)),
        (32, 32, (32,)),
        (32, 32, (128,)),
        (128, 128, RAGGED),
        (512, 8, (64,)),
        (2048, 32, RAGGED),
    ):
        yield Batch("qkv", rows, distinct, ranks)
