"""Counts of values by bound: what a process keeps of its durations, and what it tells another one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import msgspec

LOAD_BOUNDS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)  # of a phase of bringing an adapter to a tier


class Counts(msgspec.Struct, frozen=True):
    """A histogram at one moment. `counts` is as in Histogram, () before the first value."""

    counts: tuple[int, ...] = ()
    total: float = 0


class Histogram:
    """Counts of values. `counts[i]`: those above bound i - 1 and up to bound i; the last: those above all."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.total: float = 0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times


class PhaseTimes:
    """A histogram of seconds for each phase of a load."""

    def __init__(self) -> None:
        self.seconds: dict[str, Counts] = {}  # by phase; a new dict with each load, so one given out stays
        self._histograms: dict[str, Histogram] = {}

    def add(self, phases: Mapping[str, float]) -> None:
        """One load took so many seconds in each of these phases."""
        for phase, seconds in phases.items():
            self._histograms.setdefault(phase, Histogram(LOAD_BOUNDS_S)).add(seconds)
        self.seconds = {phase: Counts(times.counts, times.total) for phase, times in self._histograms.items()}
