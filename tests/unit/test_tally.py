"""Sums over steps and loads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.tally import ROW_BOUNDS, Histogram, StepTally


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


def test_loads_are_summed_by_phase_and_what_was_given_out_stays():
    tally = StepTally()
    tally.load({"host": 1.0, "device": 0.5})
    before = tally.load_seconds
    tally.load({"host": 2.0, "queue": 0.25})
    assert tally.load_seconds == {"host": 3.0, "device": 0.5, "queue": 0.25}
    assert before == {"host": 1.0, "device": 0.5}, "stats already sent are not changed"
