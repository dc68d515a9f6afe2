"""What the steps so far amounted to: histograms and sums that cost a few integers a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

ROW_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ADAPTER_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of whole numbers. `counts[i]`: values above bound i - 1 and up to bound i; the last: above all."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.total = 0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def add(self, value: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class StepTally:
    """Sums over all steps that had rows, and over all loads into device memory."""

    def __init__(self) -> None:
        self.rows = Histogram(ROW_BOUNDS)
        self.adapters = Histogram(ADAPTER_BOUNDS)
        self.load_seconds: dict[str, float] = {}  # by phase; a new dict with each load

    def step(self, rows: int, adapters: int) -> None:
        """A step of so many token rows with so many distinct adapters."""
        self.rows.add(rows)
        self.adapters.add(adapters)

    def load(self, phases: Mapping[str, float]) -> None:
        """An image came to the device; `phases`: seconds by phase."""
        sums = self.load_seconds
        self.load_seconds = sums | {phase: sums.get(phase, 0.0) + seconds for phase, seconds in phases.items()}
