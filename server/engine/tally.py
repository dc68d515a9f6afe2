"""What the steps so far amounted to: histograms and sums that cost a few integers a step."""

from __future__ import annotations

from collections.abc import Mapping

from adapters_store.histogram import Counts, Histogram, PhaseTimes

ROW_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ADAPTER_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class StepTally:
    """Sums over all steps that had rows, and over all loads into device memory."""

    def __init__(self) -> None:
        self.rows = Histogram(ROW_BOUNDS)
        self.adapters = Histogram(ADAPTER_BOUNDS)
        self._loads = PhaseTimes()

    @property
    def load_seconds(self) -> dict[str, Counts]:
        """By phase; what was given out stays as it is."""
        return self._loads.seconds

    def step(self, rows: int, adapters: int) -> None:
        """A step of so many token rows with so many distinct adapters."""
        self.rows.add(rows)
        self.adapters.add(adapters)

    def load(self, phases: Mapping[str, float]) -> None:
        """An image came to the device; `phases`: seconds by phase."""
        self._loads.add(phases)
