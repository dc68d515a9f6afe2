"""A stand-in for a device's streams: work runs as late as it may, and what nothing orders is an error.

Every piece of work knows all that must come before it: its stream's earlier work, the events that its stream waited
for, and what the host had waited for when it was given. Nothing else is taken for granted, as on a device. So
- two pieces that touch the same bytes, one of them writing, must stand in that order: else it is a race;
- a piece runs only when something that comes after it must run, or the host waits for it: who reads a result early,
  or overwrites a source early, gets wrong bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

Extent = tuple[int, int]  # addresses [low, high)


@dataclass(eq=False)
class Work:
    name: str
    number: int
    before: int  # bit set of the numbers of all work that comes before it
    needs: list[Work]
    reads: list[Extent]
    writes: list[Extent]
    run: Callable[[], None]
    is_done: bool = False

    def comes_after(self, other: Work) -> bool:
        return bool(self.before >> other.number & 1)


class RecordedEvent:
    def __init__(self, streams: RecordedStreams, work: Work | None) -> None:
        self._streams = streams
        self.work = work

    def synchronize(self) -> None:
        self._streams.wait(self.work)


class RecordedStreams:
    """server.adapters.streams.Streams over host memory. `races` is what was found, `given` every name in order."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.given: list[str] = []
        self.gate = threading.Event()  # cleared: the device comes to no end of a copy beside the steps
        self.gate.set()
        self._lock = threading.RLock()
        self._last: dict[str, Work | None] = {"step": None, "beside": None}
        self._open: list[Work] = []  # what the host hasn't waited for
        self._known = 0  # bit set of what it has
        self._count = 0
        self._pinned: list[Extent] = []

    # --- what the arena calls ----------------------------------------------------------------------------

    def mark(self) -> RecordedEvent:
        return RecordedEvent(self, self._last["step"])

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert not overlaps(extent(target), extent(source)), "a copy within the device onto itself"
        self.give("step", "move", lambda: target.copy_(source), [extent(source)], [extent(target)])

    def upload(self, target: torch.Tensor, array: npt.NDArray[Any]) -> None:
        taken = torch.from_numpy(array.copy())
        self.give("step", "upload", lambda: target.copy_(taken), [], [extent(target)])

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, after: RecordedEvent) -> RecordedEvent:
        assert self.is_pinned(source), "a copy that the host has to make"
        needs = [] if after.work is None else [after.work]
        run = lambda: target.copy_(source)  # noqa: E731
        work = self.give("beside", "load", run, [extent(source)], [extent(target)], needs)
        return RecordedEvent(self, work)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), 0xEE, dtype=torch.uint8)
        self._pinned.append(extent(memory))
        return memory

    def is_pinned(self, memory: torch.Tensor) -> bool:
        low, high = extent(memory)
        return any(start <= low and high <= end for start, end in self._pinned)

    # --- what tests call ---------------------------------------------------------------------------------

    def give(
        self,
        stream: str,
        name: str,
        run: Callable[[], object],
        reads: Sequence[Extent] = (),
        writes: Sequence[Extent] = (),
        needs: Sequence[Work] = (),
    ) -> Work:
        """Put work at the end of a stream; it runs later."""
        with self._lock:
            last = self._last[stream]
            wanted = [*needs, *([last] if last is not None else [])]
            before = self._known
            for work in wanted:
                before |= work.before | 1 << work.number
            work = Work(name, self._count, before, wanted, list(reads), list(writes), run)  # type: ignore[arg-type]
            self._count += 1
            self.given.append(name)
            self._check(work)
            self._open.append(work)
            self._last[stream] = work
        return work

    def step(self, reads: Sequence[Extent], run: Callable[[], object] = lambda: None) -> Work:
        """A step that reads these addresses, dispatched and not collected: `wait` collects it."""
        return self.give("step", "step", run, reads)

    def wait(self, work: Work | None) -> None:
        """The host waits for a piece of work, and for all that comes before it."""
        if work is None:
            return
        if work.name == "load":
            assert self.gate.wait(20), "the gate stays closed"
        with self._lock:
            self._run(work)
            self._known |= work.before | 1 << work.number
            self._open = [other for other in self._open if not self._known >> other.number & 1]

    def force(self, work: Work) -> None:
        """A piece of work and what comes before it happen now; the host doesn't know."""
        with self._lock:
            self._run(work)

    def drain(self) -> None:
        """The host waits for everything."""
        for work in self._last.values():
            self.wait(work)
        assert not self.races, self.races

    def _run(self, work: Work) -> None:
        stack = [work]
        while stack:
            top = stack[-1]
            missing = [need for need in top.needs if not need.is_done]
            if missing:
                stack += missing
                continue
            stack.pop()
            if not top.is_done:
                top.run()
                top.is_done, top.needs = True, []

    def _check(self, work: Work) -> None:
        for other in self._open:
            if work.comes_after(other):
                continue
            pairs = [(a, b) for a in work.writes for b in other.reads + other.writes]
            pairs += [(a, b) for a in work.reads for b in other.writes]
            if any(overlaps(a, b) for a, b in pairs):
                self.races.append(f"{work.name} {work.number} and {other.name} {other.number} touch the same bytes")


def extent(tensor: torch.Tensor) -> Extent:
    """The addresses of a contiguous tensor."""
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def overlaps(a: Extent, b: Extent) -> bool:
    return a[0] < b[1] and b[0] < a[1]
