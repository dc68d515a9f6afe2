"""The adapters' ops of loadtest.gpu.check: shapes x who is in the batch x ranks x dtypes, and one embedding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kernels import ops
from kernels.types import Segments, SiteGroup
from loadtest.gpu import oracle
from loadtest.gpu.adapters import Adapters, Members, SiteShape, make_adapters, segments_of, spread
from loadtest.gpu.machine import Machine

GROUPS = {
    "qkv": SiteGroup((0, 2, 5), (0, 4096, 5120), (4096, 1024, 1024), 4096),
    "o": SiteGroup((1,), (0,), (4096,), 4096),
    "gate-up": SiteGroup((3, 4), (0, 14336), (14336, 14336), 4096),
    "down": SiteGroup((6,), (0,), (4096,), 14336),
    "with gaps": SiteGroup((4, 1), (5, 90), (50, 33), 70),
}
TINY_GROUPS = {
    "qkv": SiteGroup((0, 2, 5), (0, 64, 96), (64, 32, 32), 64),
    "with gaps": SiteGroup((4, 1), (5, 60), (50, 33), 70),
}
RANKS = {"16": (16,), "ragged": (1, 3, 8, 13, 24, 64), "wide": (512, 1, 200, 8), "64, 128": (64, 128)}
TINY_RANKS = {"16": (16,), "ragged": (1, 3, 8, 13)}
DTYPES = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)
NUM_TABLE_ROWS = 7
EXTRA_COLUMNS = 7  # of y, behind the last slice

Who = Callable[[random.Random], list[Members]]


def mixed(rng: random.Random, decodes: int, chunks: Sequence[int], slots: int) -> list[Members]:
    """Decode rows sorted by slot with base rows among them, then prompts of some slots or the base."""
    own = sorted(rng.randint(0, slots) for _ in range(decodes))
    own += itertools.chain.from_iterable([rng.randint(0, slots)] * rows for rows in chunks)
    return [((slot, 1.0),) if slot else () for slot in own]


def sets(rng: random.Random, rows: int, slots: int) -> list[Members]:
    """Weighted sets of up to three, weights of either sign, every fourth row the base."""
    drawn = [rng.sample(range(1, slots + 1), row % 4) for row in range(rows)]
    return [tuple((slot, rng.choice((1.0, 0.5, -0.75, 1.3))) for slot in own) for own in drawn]


WHO: dict[str, Who] = {
    "1 row": lambda rng: spread(1, 1),
    "32 rows of 1": lambda rng: spread(32, 1),
    "32 rows of 8": lambda rng: spread(32, 8),
    "32 rows, all distinct": lambda rng: spread(32, 32),
    "128 rows, all distinct": lambda rng: spread(128, 128),
    "40 rows, base between": lambda rng: [((1 + row % 9, 1.0),) if row % 2 else () for row in range(40)],
    "24 rows, sets": lambda rng: sets(rng, 24, 8),
    "prompts": lambda rng: mixed(rng, 0, (1, 257, 300, 64, 15, 128), 5),
    "decodes and prompts": lambda rng: mixed(rng, 20, (33, 200, 5), 7),
}
TINY_WHO: dict[str, Who] = {
    "3 rows of 2": lambda rng: spread(3, 2),
    "5 rows, sets": lambda rng: sets(rng, 5, 3),
    "decodes and prompts": lambda rng: mixed(rng, 3, (18,), 2),
}


@dataclass
class LoraCase:
    """One call of segmented_lora, or with `ids` of segmented_embedding, and its oracle."""

    group: SiteGroup
    adapters: Adapters
    segments: Segments
    y: torch.Tensor  # [rows, columns]; NaN where nothing may be read or written
    x: torch.Tensor  # [rows, K]; NaN in rows of no segment
    ids: torch.Tensor | None = None

    def run(self, backend: str) -> torch.Tensor:
        """The result, for a copy of y."""
        y, weights = self.y.clone(), self.adapters.weights
        if self.ids is not None:
            ops.segmented_embedding(y, self.ids, weights, self.group.rows[0], self.segments, backend)
        else:
            ops.segmented_lora(y, self.x, weights, self.group, self.segments, backend)
        return y

    def expected(self) -> oracle.Expected:
        return oracle.lora(self.y, self.x, self.group, self.segments, self.adapters.deltas, self.ids)


@dataclass(frozen=True)
class Recipe:
    """A case's name and how to make it, anew for each seed."""

    name: str
    group: SiteGroup
    who: Who
    ranks: Sequence[int]
    dtype: torch.dtype
    vocab: int = 0

    def make(self, machine: Machine, seed: int) -> LoraCase:
        rng = random.Random(seed)
        generator = torch.Generator(machine.device).manual_seed(seed)
        members = self.who(rng)
        slots = sorted({slot for own in members for slot, _ in own})
        sites = group_sites_of(self.group, slots, self.ranks, rng, self.vocab)
        adapters = make_adapters(sites, max(slots, default=0) + 2, NUM_TABLE_ROWS, self.dtype, generator)
        return lora_case(self.group, adapters, members, self.dtype, generator, self.vocab)


def lora_case(
    group: SiteGroup,
    adapters: Adapters,
    members: list[Members],
    dtype: torch.dtype,
    generator: torch.Generator,
    vocab: int = 0,
) -> LoraCase:
    """Random inputs for these adapters, NaN where nobody may look."""
    device, rows = generator.device, len(members)
    columns = group.offsets[-1] + group.widths[-1] + (0 if vocab else EXTRA_COLUMNS)
    segments = segments_of(members)
    y = torch.randn(rows, columns, device=device, generator=generator).to(dtype)
    x = torch.randn(rows, group.in_features, device=device, generator=generator).to(dtype)
    ids = torch.randint(vocab, (rows,), device=device, generator=generator) if vocab else None
    case = LoraCase(group, adapters, segments, y, x, ids)
    case.y[~case.expected().touched] = torch.nan
    for row, own in enumerate(members):
        if not own:
            x[row] = torch.nan
    return case


def recipes(is_tiny: bool) -> Iterator[Recipe]:
    """Every group with every batch, and every pair of these, ranks and dtypes."""
    groups, who, ranks = (TINY_GROUPS, TINY_WHO, TINY_RANKS) if is_tiny else (GROUPS, WHO, RANKS)
    for (g, group), (w, batch) in itertools.product(enumerate(groups), enumerate(who)):
        own = list(ranks)[(g + w // 2) % len(ranks)]
        dtype = torch.float32 if is_tiny else DTYPES[(g + w) % len(DTYPES)]
        name = f"lora {group}, {batch}, ranks {own}, {short(dtype)}"
        yield Recipe(name, groups[group], who[batch], ranks[own], dtype)
    hidden, vocab = (64, 50) if is_tiny else (4096, 128_256)
    for dtype in (torch.float32,) if is_tiny else (torch.bfloat16, torch.float32):
        batch = "3 rows of 2" if is_tiny else "decodes and prompts"
        embedding = SiteGroup((0,), (0,), (hidden,), 0)
        yield Recipe(f"embedding, {batch}, {short(dtype)}", embedding, who[batch], (8, 13), dtype, vocab)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_sites_of(
    group: SiteGroup, slots: Iterable[int], ranks: Sequence[int], rng: random.Random, vocab: int = 0
) -> dict[tuple[int, int], SiteShape]:
    """Mostly whole; every fourth slot lacks a slice, has biases, is only a bias somewhere, or has ranks apart."""
    sites = {}
    for slot in slots:
        kind = rng.choice(("absent", "bias", "only bias", "half")) if slot % 4 == 3 and not vocab else "whole"
        for number, (row, width) in enumerate(zip(group.rows, group.widths, strict=True)):
            if kind == "absent" and number == 0:
                continue
            rank = ranks[slot % len(ranks)]
            rank = {"only bias": 0, "half": -(-rank // 2)}.get(kind, rank)
            sites[slot, row] = SiteShape(width, group.in_features, rank, "bias" in kind, vocab)
    return sites
