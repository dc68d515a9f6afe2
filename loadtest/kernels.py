"""`multilora bench kernels`: each native kernel against torch's backend, the reference and the machine's limits.

    multilora bench kernels [--kernels gemm head lora attention small] [--models 135M M] [--json kernels.json]

Microseconds of one call: a matrix, a layer's adapters, a layer's attention. Contestants take turns; each time is the
best round's mean over all copies of the weights, so a busy machine costs samples and not truth. The limits are
sampled between the rounds of the same case: "bytes" is what must be read over the read bandwidth, "products" the
multiply-adds over the rate of register-only dot products (of AVX-512; tiles may beat it). Native GEMMs run in one
parallel region like in a step; the other kernels' calls go through Python, as torch's do. A dash: all is in caches,
or the reference (loops, for being right) would take too long; it is timed once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console

from kernels.cpu import library as native_library
from kernels.native_library import Library
from loadtest import kernel_cases
from loadtest.kernel_cases import SHAPES, Case
from loadtest.options import Parser, count, result_file
from loadtest.table import rows_table

ROWS = (1, 8, 32, 128)
ROUNDS = 7
DISTINCT = (1, 8, 32)
PREFILLS = (((8,), 128), ((16,), 128), ((64,), 128), ((16,), 512), ((64,), 512), ((8, 16, 32, 64), 128))
"""Ranks of the adapters, rows of each."""
ATTENTION = {
    "decode 32 over 160": [(160, 1)] * 32,
    "decode 32 over 1024": [(1024, 1)] * 32,
    "decode 1 over 4096": [(4096, 1)],
    "prefill 128": [(128, 128)],
    "prefill 512": [(512, 512)],
    "prefill 512 over 512": [(1024, 512)],
}
_READ_BYTES = 16 << 20  # of a sample


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked, 1 where there are no native kernels."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        library = native_library()
    except ValueError as error:
        parser.error(str(error))
    if library is None:
        parser.exit(1, "multilora bench kernels: no native kernels here; MULTILORA_CPU_KERNELS and the log say why\n")
    console, limits = Console(), Limits(library)
    rows: dict[str, dict[str, float | None]] = {}
    with torch.inference_mode():
        for case in cases(options, library):
            rows[case.name] = measure(case, limits, options.rounds)
            console.print(f"{case.name}: {rows[case.name]['native, us']:.1f} us", highlight=False)
    rows |= step_totals(rows, options.models, options.rows) if "gemm" in options.kernels else {}
    machine = {
        "level": library.level,
        "threads": torch.get_num_threads(),
        "read, GB/s, the best": limits.best_read / 1e9,
        "multiply-adds/s, billions, the best": limits.best_multiply / 1e9,
    }
    console.print(rows_table("kernels", rows))
    console.print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in machine.items()
        )
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "kernels": rows}, indent=2) + "\n")


def cases(options: argparse.Namespace, library: Library) -> Iterator[Case]:
    """Those asked for, made one after the other: each has much memory."""
    for model in options.models:
        if "gemm" in options.kernels:
            yield from kernel_cases.gemm_cases(library, model, options.rows)
        if "head" in options.kernels:
            yield from kernel_cases.head_cases(library, model, options.rows)
        if "lora" in options.kernels:
            yield from kernel_cases.lora_cases(model, DISTINCT, PREFILLS)
        if "attention" in options.kernels:
            yield from kernel_cases.attention_cases(model, ATTENTION)
        if "small" in options.kernels:
            yield from kernel_cases.small_cases(library, model, options.rows)


@dataclass
class Limits:
    """What the machine can do: the best of the case's samples, and of all."""

    library: Library
    read: float = 0.0  # bytes per second
    multiply: float = 0.0  # multiply-adds per second, all threads
    best_read: float = 0.0
    best_multiply: float = 0.0
    _buffer: torch.Tensor = field(default_factory=lambda: torch.ones(kernel_cases.COLD_BYTES, dtype=torch.uint8))
    _at: int = 0

    def __post_init__(self) -> None:
        self._read = self.library.function("ml_read", ctypes.c_void_p, ctypes.c_int64, result=ctypes.c_uint64)
        self._multiply = self.library.function("ml_multiply", ctypes.c_int64, result=ctypes.c_int64)

    def begin(self) -> None:
        """A new case."""
        self.read = self.multiply = 0.0

    def sample(self) -> None:
        """One run of each, some milliseconds."""
        for _ in range(4):
            self._at = (self._at + _READ_BYTES) % len(self._buffer)
            start = time.perf_counter()
            self._read(self._buffer.data_ptr() + self._at, _READ_BYTES)
            middle = time.perf_counter()
            products = self._multiply(100_000) * torch.get_num_threads()
            self.read = max(self.read, _READ_BYTES / (middle - start))
            self.multiply = max(self.multiply, products / (time.perf_counter() - middle))
        self.best_read, self.best_multiply = max(self.best_read, self.read), max(self.best_multiply, self.multiply)


def measure(case: Case, limits: Limits, rounds: int) -> dict[str, float | None]:
    """One row of the table."""
    limits.begin()
    best = {"native": float("inf"), "torch": float("inf")}
    contestants: dict[str, Callable[[int, int], object]] = {"native": case.native, "torch": case.torch}
    for call in contestants.values():
        call(0, 1)  # what is made once
    for _ in range(rounds):
        limits.sample()
        for name, call in contestants.items():
            best[name] = min(best[name], _seconds(call, case.count))
    reference = _seconds(case.reference, 1) if case.reference else None
    bytes_s = case.num_bytes / limits.read if case.num_bytes else None
    products_s = case.products / limits.multiply if case.products and limits.multiply else None
    floor = max(bytes_s or 0.0, products_s or 0.0)
    return {
        "native, us": best["native"] * 1e6,
        "torch, us": best["torch"] * 1e6,
        "reference, us": None if reference is None else reference * 1e6,
        "bytes, us": None if bytes_s is None else bytes_s * 1e6,
        "products, us": None if products_s is None else products_s * 1e6,
        "over the bytes": best["native"] / bytes_s if bytes_s else None,
        "over the larger": best["native"] / floor if floor else None,
        "torch over native": best["torch"] / best["native"],
    }


def step_totals(
    rows: Mapping[str, Mapping[str, float | None]], models: Sequence[str], row_counts: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """The GEMMs of all layers of a step, without the head: sums over the matrices."""
    totals: dict[str, dict[str, float | None]] = {}
    for model in models:
        for number in row_counts:
            found = [
                row for name, row in rows.items() if name.startswith(f"gemm {model} ") and f", {number} rows" in name
            ]
            columns = ("native, us", "torch, us", "bytes, us", "products, us")
            sums = {column: SHAPES[model].layers * sum(row[column] or 0.0 for row in found) for column in columns}
            floors = SHAPES[model].layers * sum(
                max(row["bytes, us"] or 0.0, row["products, us"] or 0.0) for row in found
            )
            totals[f"all layers' gemm {model}, {number} rows"] = {
                **sums,
                "over the bytes": sums["native, us"] / sums["bytes, us"],
                "over the larger": sums["native, us"] / floors,
                "torch over native": sums["torch, us"] / sums["native, us"],
            }
    return totals


def _seconds(call: Callable[[int, int], object], count: int) -> float:
    """Of one copy, the mean over `count`."""
    start = time.perf_counter()
    call(0, count)
    return (time.perf_counter() - start) / count


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="multilora bench kernels", description=__doc__, formatter_class=raw)
    kinds = ["gemm", "head", "lora", "attention", "small"]
    parser.add_argument("--kernels", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--rows", nargs="+", type=count, default=list(ROWS), help="of GEMMs, the head and the small ops"
    )
    parser.add_argument("--rounds", type=count, default=ROUNDS)
    parser.add_argument("--threads", type=count, help="torch threads; default is torch's own")
    parser.add_argument("--json", type=result_file, help="write the figures here too")
    return parser
