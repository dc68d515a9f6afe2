"""Sums over steps and loads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapters_store.histogram import Histogram
from server.engine.tally import ROW_BOUNDS, StepTally


@given(st.lists(st.integers(0, 40_000)))
def test_each_value_is_counted_in_the_bucket_that_bounds_it(values):
    histogram = Histogram(ROW_BOUNDS)
    for value in values:
        histogram.add(value)
    lower = (-1, *ROW_BOUNDS)
    upper = (*ROW_BOUNDS, 1 << 60)
    expected = [sum(low < value <= high for value in values) for low, high in zip(lower, upper, strict=True)]
    assert histogram.counts == tuple(expected)
    assert histogram.total == sum(values)


def test_loads_are_counted_by_phase_and_what_was_given_out_stays():
    tally = StepTally()
    tally.load({"host": 1.0, "device": 0.5})
    before = tally.load_seconds
    totals = {phase: times.total for phase, times in before.items()}
    counts = before["host"].counts
    tally.load({"host": 2.0, "queue": 0.25})
    assert {phase: times.total for phase, times in tally.load_seconds.items()} == {
        "host": 3.0,
        "device": 0.5,
        "queue": 0.25,
    }
    assert sum(tally.load_seconds["host"].counts) == 2
    assert {phase: times.total for phase, times in before.items()} == totals, "stats already sent are not changed"
    assert before["host"].counts == counts
