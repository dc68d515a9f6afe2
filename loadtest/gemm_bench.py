"""The packed GEMM next to the machine's limits and to torch, all in the same run.

    python -m loadtest.gemm_bench [--model 0.5B ...] [--rows 1 8 32 512] [--threads 2] [--seconds 1]

One line per matrix and number of rows; the last one of a model is a whole forward pass's linear layers. The
weights are cold: every call takes the next of many copies, 512 MiB together. Measured are short runs of
calls inside one parallel region, those of torch and of the limits in between; each figure is the best run,
so that a busy machine costs samples, not truth. "limit" is the larger of the bytes over the read bandwidth
and the multiplications over the peak of register-only dot products; 1.00 means that nothing is left to gain.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.cpu.build import load
from kernels.cpu.gemm import Gemm, GemmArgs, aligned_empty
from kernels.cpu.library import Library

COLD_BYTES = 512 << 20
RUN_S = 1.5e-3
"""Aimed at for one run of calls: shorter than a scheduler's time slice."""

MODELS = {
    "135M": (30, {"qkv": (960, 576), "o": (576, 576), "gate-up": (3072, 576), "down": (576, 1536)}, (49152, 576)),
    "0.5B": (24, {"qkv": (1152, 896), "o": (896, 896), "gate-up": (9728, 896), "down": (896, 4864)}, (151936, 896)),
}
"""Layers, a layer's matrices [N, K], the head: SmolLM2-135M and Qwen2.5-0.5B with their packed projections."""
HEAD_PARTS = 16
"""The head is measured as one of so many equal parts, to fit into a run."""


@dataclass
class Limits:
    """The best that was seen of the machine so far."""

    library: Library
    read: float = 0.0  # bytes per second
    multiply: float = 0.0  # multiplications per second, all threads
    _buffer: torch.Tensor = field(default_factory=lambda: torch.ones(COLD_BYTES // 8, dtype=torch.int64))
    _at: int = 0

    def sample(self) -> None:
        """One run of each."""
        read = self.library.function("ml_read", ctypes.c_void_p, ctypes.c_int64, result=ctypes.c_uint64)
        multiply = self.library.function("ml_multiply", ctypes.c_int64, result=ctypes.c_int64)
        size = COLD_BYTES // 32
        self._at = (self._at + size) % COLD_BYTES
        start = time.perf_counter()
        read(self._buffer.data_ptr() + self._at, size)
        middle = time.perf_counter()
        products = multiply(100_000) * torch.get_num_threads()
        self.read = max(self.read, size / (middle - start))
        self.multiply = max(self.multiply, products / (time.perf_counter() - middle))

    def seconds(self, n: int, k: int, rows: int) -> float:
        """The least time of a product: its weights' bytes, or its multiplications."""
        return max(2 * n * k / self.read, n * k * rows / self.multiply if self.multiply else 0.0)


class Weights:
    """Copies of one matrix, packed and plain, through which calls rotate."""

    def __init__(self, library: Library, n: int, k: int) -> None:
        gemm = Gemm(library)
        self.n, self.k = n, k
        self.count = max(2, -(-COLD_BYTES // (2 * n * k)))
        plain = torch.randn(n, k).bfloat16()
        size = gemm.packed_size(n, k)
        self._memory = aligned_empty(size * self.count)
        self._packed = [gemm.pack(plain, out) for out in self._memory.split(size)]
        self._plain = [plain.clone() for _ in range(self.count)]
        self._gemms = library.function("ml_gemms", ctypes.c_void_p, ctypes.c_int64)

    def runs(self, rows: int, calls: int) -> tuple[Callable[[int], object], Callable[[int], object]]:
        """(ours, torch's): each does `calls` products with the copies from the given one on."""
        x, y = torch.randn(rows, self.k).bfloat16(), torch.empty(rows, self.n).bfloat16()
        address = x.data_ptr(), y.data_ptr()
        args = (GemmArgs * self.count)(
            *(
                GemmArgs(address[0], self.k, w.data.data_ptr(), None, address[1], self.n, rows, self.n, self.k)
                for w in self._packed
            )
        )

        def ours(first: int) -> None:
            assert len(x) == len(y) == rows  # kept alive with the arguments
            self._gemms(ctypes.addressof(args[first]), calls)

        def theirs(first: int) -> None:
            for w in self._plain[first : first + calls]:
                torch.nn.functional.linear(x, w)

        return ours, theirs


def measure(weights: Weights, rows: int, limits: Limits, seconds: float) -> tuple[float, float]:
    """Seconds of one product: (ours, torch's), the best of the runs that fit into `seconds`."""
    about = max(2 * weights.n * weights.k / 40e9, weights.n * weights.k * rows / 200e9)
    calls = max(1, min(weights.count // 2, int(RUN_S / about)))
    functions = weights.runs(rows, calls)
    best, first, end = [float("inf")] * 2, 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function(first)
            best[i] = min(best[i], (time.perf_counter() - start) / calls)
            first = first + calls if first + 2 * calls <= weights.count else 0
        limits.sample()
    return best[0], best[1]


def line(name: str, rows: int, ours: float, theirs: float, bytes_read: float, limit: float) -> None:
    print(
        f"{name:14} {rows:5} {ours * 1e6:10.1f} {bytes_read / ours / 1e9:8.1f} {limit / ours:8.2f} "
        f"{theirs * 1e6:10.1f} {theirs / ours:9.2f}",
        flush=True,
    )


def run(models: list[str], all_rows: list[int], seconds: float, library: Library) -> None:
    limits = Limits(library)
    for _ in range(200):
        limits.sample()
    print(f"{'matrix':14} {'rows':>5} {'us':>10} {'GB/s':>8} {'of limit':>8} {'torch us':>10} {'x torch':>9}")
    for model in models:
        layers, matrices, head = MODELS[model]
        totals = {rows: [0.0, 0.0, 0.0, 0.0] for rows in all_rows}  # ours, torch's, bytes, limit
        for name, (n, k) in (matrices | {"head/16": (head[0] // HEAD_PARTS, head[1])}).items():
            weights = Weights(library, n, k)
            for rows in all_rows:
                ours, theirs = measure(weights, rows, limits, seconds)
                values = ours, theirs, 2.0 * n * k, limits.seconds(n, k, rows)
                line(f"{model} {name}", rows, *values)
                times = layers if name in matrices else HEAD_PARTS
                totals[rows] = [total + times * value for total, value in zip(totals[rows], values, strict=True)]
        for rows, total in totals.items():
            line(f"{model} all", rows, *total)
    print(f"read {limits.read / 1e9:.1f} GB/s, {limits.multiply / 1e9:.0f} G multiply-adds/s, level {library.level}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = load()
    if library is None:
        parser.exit(1, "no native kernels on this machine; MULTILORA_CPU_KERNELS and the log say why\n")
    run(args.model, args.rows, args.seconds, library)


if __name__ == "__main__":
    main()
