"""Prometheus's text format, written fast: all of a line but its number is made once.

A router scrapes up to 20 times a second, so a scrape must not build objects per sample. Everything here is
used from one event loop; no locks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from adapters_store.histogram import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


def head(name: str, kind: str, text: str) -> str:
    """The two lines before a family's samples. `kind`: counter, gauge or histogram."""
    escaped = text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def start_of(name: str, labels: Labels) -> str:
    """A sample's line up to its number."""
    pairs = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
    return f"{name}{{{pairs}}} "


def number(value: float) -> str:
    """A sample's value as Go reads it."""
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class HistogramLines:
    """The lines of one histogram's samples."""

    __slots__ = ("_buckets", "_count", "_sum")

    def __init__(self, name: str, bounds: Sequence[float], labels: Labels) -> None:
        bounds_told = [*(repr(float(bound)) for bound in bounds), "+Inf"]
        self._buckets = [start_of(f"{name}_bucket", {**labels, "le": bound}) for bound in bounds_told]
        self._count = start_of(f"{name}_count", labels)
        self._sum = start_of(f"{name}_sum", labels)

    def text(self, counts: Sequence[int], total: float) -> str:
        """The lines; `counts` as in Histogram, () for no value yet."""
        sums = list(accumulate(counts)) or [0] * len(self._buckets)
        lines = [f"{start}{count}\n" for start, count in zip(self._buckets, sums, strict=True)]
        return f"{''.join(lines)}{self._count}{sums[-1]}\n{self._sum}{number(total)}\n"


class CounterSeries:
    """One series of a counter."""

    __slots__ = ("_start", "value")

    def __init__(self, name: str, labels: Labels) -> None:
        self.value: float = 0
        self._start = start_of(name, labels)

    def add(self, amount: float = 1) -> None:
        self.value += amount

    def text(self) -> str:
        return f"{self._start}{number(self.value)}\n"


class HistogramSeries:
    """One series of a histogram; two may show the same values under two names."""

    __slots__ = ("_lines", "_values")

    def __init__(self, name: str, bounds: Sequence[float], labels: Labels, values: Histogram) -> None:
        self._lines = HistogramLines(name, bounds, labels)
        self._values = values

    def text(self) -> str:
        return self._lines.text(self._values.counts, self._values.total)


class Family:
    """A name's head and its series."""

    def __init__(self, name: str, kind: str, text: str) -> None:
        self.name = name
        self.series: list[CounterSeries | HistogramSeries] = []
        self._head = head(name, kind, text)

    def text(self) -> Iterator[str]:
        """Its part of the exposition."""
        yield self._head
        for series in self.series:
            yield series.text()


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
