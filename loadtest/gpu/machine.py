"""The device: graphs, times and the limits that figures are held against.

On the CPU (--tiny) a graph is its function called again, and times are the host clock's.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

POISON_BYTES = 4 << 30  # of free memory made NaN before a check
_POISON_SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30)  # allocators keep small ones apart
_MAX_REPLAYS = 50


class Graph(Protocol):
    """Work on fixed addresses, ready to be run again."""

    def replay(self) -> None:
        """Start it once more, on the current stream."""


@dataclass
class Machine:
    """Where the scripts run."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def l2_bytes(self) -> int:
        """Of the device's last cache; a stand-in on the CPU."""
        if not self.is_cuda:
            return 1 << 12
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """From the host in stream order, without waiting: through memory that is pinned until the copy has happened."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else values

    def to_host(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """A copy in pinned memory, to be read once the event has happened."""
        if not self.is_cuda:
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        return host, self.event()

    def event(self) -> torch.cuda.Event | None:
        """Happens when all that was started before it is done."""
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def capture(self, run: Callable[[], object]) -> Graph:
        """A graph of `run`, which is called once or twice before: what is compiled or allocated once is not in it."""
        if not self.is_cuda:
            run()
            return _Again(run)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def microseconds(self, run: Callable[[], object], calls: int = 1, budget_s: float = 0.01) -> list[float]:
        """Time of one of the `calls` that `run` makes: of the runs that fit the budget, or three; on the CPU, one."""
        once = self._microseconds(run)
        if not self.is_cuda:
            return [once / calls]
        count = int(min(max(budget_s * 1e6 / max(once, 1.0), 3), _MAX_REPLAYS))
        return [self._microseconds(run) / calls for _ in range(count)]

    def poison(self, num_bytes: int | None = None) -> None:
        """Fill free memory with NaN, so that whoever reads what nobody wrote shows it. The allocator keeps it."""
        left = num_bytes or (POISON_BYTES if self.is_cuda else 1 << 20)
        kept = []
        for size in _POISON_SIZES:
            for _ in range(8):
                if size <= left:
                    kept.append(torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device))
                    left -= size
        self.synchronize()

    def copy_bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written."""
        size = (4 << 30) if self.is_cuda else 1 << 20
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        times = self.microseconds(lambda: target.copy_(source), budget_s=0.05)
        return 2 * size / (statistics.median(times) * 1e-6)

    def matrix_rate(self) -> float:
        """Multiply-adds a second of a large bf16 product of random matrices."""
        size = 8192 if self.is_cuda else 64
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        times = self.microseconds(lambda: a @ b, budget_s=0.05)
        return size**3 / (statistics.median(times) * 1e-6)

    def launch_us(self) -> float:
        """Of the smallest kernel in a graph that waits for the one before it."""
        one, calls = torch.zeros(1, device=self.device), 500 if self.is_cuda else 2

        def run() -> None:
            for _ in range(calls):
                one.add_(1)

        return statistics.median(self.microseconds(self.capture(run).replay, calls))

    def limits(self) -> dict[str, float]:
        """What figures are held against, taken now."""
        return {
            "copy_bytes_per_s": self.copy_bandwidth(),
            "multiply_adds_per_s": self.matrix_rate(),
            "launch_us": self.launch_us(),
        }

    def description(self) -> dict[str, object]:
        """Which machine and which versions."""
        found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
        if not self.is_cuda:
            return found | {"device": "CPU, a tiny run: no time here means anything"}
        properties = torch.cuda.get_device_properties(self.device)
        return found | {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": properties.total_memory,
        }

    def _microseconds(self, run: Callable[[], object]) -> float:
        if not self.is_cuda:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def in_turns(
    machine: Machine, contestants: Iterable[tuple[str, Graph, int]], rounds: int = 3, budget_s: float = 0.01
) -> dict[str, list[list[float]]]:
    """Microseconds of a call by name and round; contestants are (name, graph, calls in it) and take turns."""
    found: dict[str, list[list[float]]] = {}
    held = list(contestants)
    for _ in range(rounds):
        for name, graph, calls in held:
            found.setdefault(name, []).append(machine.microseconds(graph.replay, calls, budget_s))
    return found


class _Again:
    """The CPU's graph."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    def replay(self) -> None:
        self._run()
