"""What does a whole step cost on this device, with adapters and without? And does every row keep its own?

    python -m loadtest.gpu.steps [--out steps.json] [--only decode prefill isolation] [--context 512]

decode     one graph a batch: an 8B-shaped decoder with random weights, batches of 32 and 128 rows over --context
           positions each, without adapters and with 1, 8, 32 distinct of rank 16, 32 of rank 64, 32 of ragged;
           then with the fused CUDA C++ kernel, where this device has it (see kernels)
prefill    2,048 tokens of 1, 8 and 32 prompts, one adapter each, from Python as a server runs them, and as a graph
isolation  a small decoder's graphs while adapters are loaded and evicted and requests aborted: every row against fp32

floor     bytes that must move over the copy bandwidth of this run (decode: weights, keys, adapters), or multiply-adds
          over the rate of a large product
of base   the same step without adapters over this one; "floor of base" is what the adapters' bytes leave of it

This covers the products (cuBLAS through torch), attention, KV writes, adapters, norms, rotary embedding, SwiGLU, the
head and its largest logit, on the device. It does not cover the server: Hugging Face's modules, scheduling, copies of
inputs and results, sampling. Its small ops are kernels of this bench. The rotation of adapters in `isolation` is a
small one of its own, too.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.types import SlotWeights
from loadtest.gpu import fused
from loadtest.gpu.adapters import group_sites, make_adapters, segments_of, spread
from loadtest.gpu.check_attention import Requests, block_tables, metadata
from loadtest.gpu.decoder import BLOCK_SIZE, Decoder, StepAdapters
from loadtest.gpu.isolation import REAL, measure_isolation
from loadtest.gpu.isolation import TINY as TINY_ISOLATION
from loadtest.gpu.machine import Graph, in_turns
from loadtest.gpu.output import Run, begin, parser
from loadtest.gpu.shapes import LLAMA_8B, RAGGED, TINY, Batch, Shape
from loadtest.options import count

PARTS = ("isolation", "decode", "prefill")
COLUMNS = ("case", "ms", "floor", "over floor", "tokens/s", "of base", "floor of base", "goal", "met")
BASE_GOAL = 1.25  # over its floor
PREFILL_GOAL = 0.9  # of base, at rank 16
BUDGET_S = 0.1  # of a graph in a round


@dataclass(frozen=True)
class Variant:
    """Adapters of a step."""

    name: str
    distinct: int
    ranks: tuple[int, ...]
    goal: float | None = None  # of base


VARIANTS = (
    Variant("1, rank 16", 1, (16,), 0.93),
    Variant("8, rank 16", 8, (16,), 0.90),
    Variant("32, rank 16", 32, (16,), 0.84),
    Variant("32, rank 64", 32, (64,)),
    Variant("32, ragged", 32, RAGGED),
)
TINY_VARIANTS = (Variant("2, rank 16", 2, (16,), 0.93), Variant("2, ragged", 2, (8, 3)))


@dataclass
class Bench:
    """The decoder, and arenas by their ranks: made when first asked for."""

    run: Run
    limits: dict[str, float]
    decoder: Decoder = field(init=False)
    arenas: dict[tuple[int, ...], SlotWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.run.machine.device).manual_seed(self.run.seed)
        positions = max(self.batches) * self.context + 4 * BLOCK_SIZE
        num_blocks = max(positions, self.prompt_tokens + 64 * BLOCK_SIZE) // BLOCK_SIZE + max(self.batches)
        longest = max(self.context, self.prompt_tokens) + 1
        dtype = torch.float32 if self.run.is_tiny else torch.bfloat16
        self.decoder = Decoder(
            self.run.machine, self.run.options.backend, self.shape, dtype, generator, num_blocks, longest
        )
        self._generator = generator

    @property
    def shape(self) -> Shape:
        return TINY if self.run.is_tiny else LLAMA_8B

    @property
    def batches(self) -> tuple[int, ...]:
        return (2, 3) if self.run.is_tiny else (32, 128)

    @property
    def context(self) -> int:
        return 20 if self.run.is_tiny else int(self.run.options.context)

    @property
    def prompt_tokens(self) -> int:
        return 24 if self.run.is_tiny else 2048

    @property
    def variants(self) -> tuple[Variant, ...]:
        return TINY_VARIANTS if self.run.is_tiny else VARIANTS

    def adapters(self, variant: Variant, rows: int) -> StepAdapters:
        """Of the variant, its rows in runs of equal length."""
        weights = self.arenas.get(variant.ranks)
        if weights is None:
            most = max(own.distinct for own in self.variants if own.ranks == variant.ranks)
            ranks = [variant.ranks[i % len(variant.ranks)] for i in range(most)]
            sites = {}
            for layer in self.decoder.layers:
                for group in layer.groups.values():
                    sites |= group_sites(group, ranks)
            made = make_adapters(
                sites, most + 1, self.decoder.num_site_rows, self.decoder.dtype, self._generator, keep=False
            )
            weights = self.arenas[variant.ranks] = made.weights
        return StepAdapters(weights, segments_of(spread(rows, variant.distinct)))

    def step(self, requests: Requests, adapters: StepAdapters | None) -> Callable[[], torch.Tensor]:
        """A forward pass of these requests and the largest logit of each one's last row."""
        device, rng = self.run.machine.device, random.Random(self.run.seed)
        rows = sum(own for _, own in requests)
        ids = torch.randint(self.shape.vocab, (rows,), device=device, generator=self._generator)
        positions = torch.cat([torch.arange(context - own, context, device=device) for context, own in requests])
        tables = block_tables([context for context, _ in requests], BLOCK_SIZE, rng)
        meta = metadata(requests, tables, BLOCK_SIZE, device)
        last = None if rows == len(requests) else torch.tensor(meta.query_starts[1:], device=device) - 1
        return lambda: self.decoder.forward(ids, positions, meta, adapters, last).argmax(-1)

    def decode(self, rows: int) -> list[dict[str, Any]]:
        """One line without adapters, one for each variant."""
        machine, requests = self.run.machine, [(self.context, 1)] * rows
        graphs: list[tuple[str, Graph, int]] = [("base", machine.capture(self.step(requests, None)), 1)]
        variants = [(variant.name, variant) for variant in self.variants]
        graphs += [(name, machine.capture(self.step(requests, self.adapters(own, rows))), 1) for name, own in variants]
        for how, lora in fused.contestants(self.run.options.backend).items():
            ours, self.decoder.lora = self.decoder.lora, lora
            by = [(f"{own.name}, {how}", own) for own in self.variants if max(own.ranks) <= fused.MAX_RANK]
            graphs += [(name, machine.capture(self.step(requests, self.adapters(own, rows))), 1) for name, own in by]
            self.decoder.lora = ours
            variants += by
        times = in_turns(machine, graphs, budget_s=BUDGET_S)
        us = {name: statistics.median(one for own in found for one in own) for name, found in times.items()}
        item = self.decoder.dtype.itemsize
        floor = item * (self.shape.matrix_elements + rows * self.context * self.shape.kv_elements) / self._bandwidth
        lines = [self._line(f"decode {rows}, base", us["base"], floor, rows, BASE_GOAL)]
        for name, variant in variants:
            extra = self._adapter_bytes(variant, 0) / self._bandwidth
            lines.append(
                self._line(f"decode {rows}, {name}", us[name], floor + extra, rows)
                | _of_base(us["base"], us[name], extra, variant.goal)
            )
        return lines

    def prefill(self, prompts: int, is_graph: bool) -> list[dict[str, Any]]:
        """The same prompts without adapters, and with one each."""
        machine, tokens = self.run.machine, self.prompt_tokens
        requests = [(tokens // prompts,) * 2] * prompts
        variant = Variant(f"{prompts}, rank 16", prompts, (16,))
        runs = {
            "base": self.step(requests, None),
            "adapters": self.step(requests, self.adapters(variant, tokens)),
        }
        for run in runs.values():
            run()  # compiles
        graphs = [(name, machine.capture(run) if is_graph else _Eager(run), 1) for name, run in runs.items()]
        times = in_turns(machine, graphs, budget_s=BUDGET_S)
        us = {name: statistics.median(one for own in found for one in own) for name, found in times.items()}
        shape, rate = self.shape, self.limits["multiply_adds_per_s"] * 1e-6
        heads = shape.vocab * shape.hidden
        keys = sum(context * (context + 1) // 2 for context, _ in requests)
        attention = 2 * keys * shape.heads * shape.head_dim * shape.layers
        floor = (tokens * (shape.matrix_elements - heads) + prompts * heads + attention) / rate
        extra = self._adapter_bytes(variant, tokens) / self._bandwidth
        how = "graph" if is_graph else "eager"
        name = f"prefill {tokens} of {prompts}, {how}"
        return [
            self._line(f"{name}, base", us["base"], floor, tokens),
            self._line(f"{name}, rank 16", us["adapters"], floor + extra, tokens)
            | _of_base(us["base"], us["adapters"], extra, PREFILL_GOAL),
        ]

    @property
    def _bandwidth(self) -> float:
        """Bytes a microsecond."""
        return self.limits["copy_bytes_per_s"] * 1e-6

    def _adapter_bytes(self, variant: Variant, rows: int) -> int:
        """Of all layers: the adapters once, and of so many rows the inputs read and outputs read and written."""
        item, total = self.decoder.dtype.itemsize, 0
        for name in self.shape.projections:
            total += Batch(name, rows, variant.distinct, variant.ranks).num_bytes(self.shape, item)
        return self.shape.layers * total

    def _line(self, name: str, us: float, floor: float, tokens: int, goal: float | None = None) -> dict[str, Any]:
        line = {
            "case": name,
            "ms": us / 1e3,
            "floor": floor / 1e3,
            "over floor": us / floor,
            "tokens/s": tokens / us * 1e6,
        }
        return line if goal is None else line | {"goal": goal, "met": us / floor <= goal}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 1 where a row was wrong, or a fault on purpose went unseen."""
    made = parser("steps", __doc__)
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--context", type=count, default=512, help="positions of each decode row")
    options = made.parse_args(arguments)
    run = begin("steps", options)
    with torch.inference_mode():
        if "isolation" in options.only:
            isolation(run)
        limits = run.machine.limits()
        if {"decode", "prefill"} & set(options.only):
            bench = Bench(run, limits)
            timed(run, bench, options.only)
    storms: dict[str, dict[str, Any]] = run.extra.get("isolation", {})
    wrong = sum(storm["wrong"] for fault, storm in storms.items() if fault not in FAULTS)
    unseen = sum(not storm["wrong"] for fault, storm in storms.items() if fault in FAULTS)
    return run.finish(COLUMNS, summary(run, storms, limits), wrong + unseen)


def isolation(run: Run) -> None:
    """As it is, and with the fused kernel where there is one, named by its backend; then broken in two ways.

    A check that sees neither of these sees nothing.
    """
    setting = TINY_ISOLATION if run.is_tiny else REAL
    found: dict[str, Any] = {}
    own = run.options.backend
    for name, backend, fault in (
        ("none", own, "none"),
        *((other, other, "none") for other in fused.backends_beside(own)),
        *((fault, own, fault) for fault in FAULTS),
    ):
        before = len(run.rows)
        run.case(
            f"isolation, fault {name}",
            lambda backend=backend, fault=fault: measure_isolation(run.machine, backend, setting, run.seed, fault),
        )
        for row in run.rows[before:]:
            found[name] = row
        del run.rows[before:]
    run.extra["isolation"] = found


def timed(run: Run, bench: Bench, parts: Sequence[str]) -> None:
    if "decode" in parts:
        for rows in bench.batches:
            run.case(f"decode {rows}", lambda rows=rows: bench.decode(rows))
    if "prefill" in parts:
        for is_graph in (True, False):
            for prompts in (1, 2) if run.is_tiny else (1, 8, 32):
                run.case(
                    f"prefill of {prompts}", lambda prompts=prompts, is_graph=is_graph: bench.prefill(prompts, is_graph)
                )


def summary(run: Run, storms: dict[str, dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """The lines below the table."""
    lines: dict[str, Any] = {}
    for fault, storm in storms.items():
        told = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in storm.items()
            if key not in ("case", "took_s")
        )
        lines["isolation" if fault == "none" else f"isolation, {FAULTS.get(fault, fault)}"] = told
    met = [row["met"] for row in run.rows if row.get("met") is not None]
    return lines | {
        "goals met": f"{sum(met)} of {len(met)}",
        "copy, GB/s": limits["copy_bytes_per_s"] / 1e9,
        "bf16 product, TFLOP/s": 2 * limits["multiply_adds_per_s"] / 1e12,
    }


FAULTS = {"refs": "slots in use refilled (must be wrong)", "plan": "stale segments (must be wrong)"}


def _of_base(base: float, us: float, extra: float, goal: float | None) -> dict[str, Any]:
    found = {"of base": base / us, "floor of base": base / (base + extra)}
    return found if goal is None else found | {"goal": goal, "met": base / us >= goal}


@dataclass
class _Eager:
    """Work that Python starts anew each time."""

    run: Callable[[], object]

    def replay(self) -> None:
        self.run()


if __name__ == "__main__":
    sys.exit(main())
