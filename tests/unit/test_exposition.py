"""The text format against its own reader: prometheus_client's parser gives back what was put in."""

from __future__ import annotations

import math
from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.histogram import Histogram as OurHistogram
from server.exposition import CounterSeries, Family, HistogramLines, HistogramSeries, head, number, start_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e"))
VALUES = st.floats() | st.integers(-(2**53), 2**53)
BOUNDS = (0.001, 0.5, 1, 10)


def samples(text: str) -> dict[tuple, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


@given(TEXTS, TEXTS, TEXTS, VALUES)
def test_a_sample_comes_back(help_text, first, second, value):
    text = head("m", "gauge", help_text) + start_of("m", {"a": first, "b": second}) + number(value) + "\n"
    ((name, labels),) = found = samples(text)
    assert (name, dict(labels)) == ("m", {"a": first, "b": second})
    assert found[name, labels] == value or (math.isnan(value) and math.isnan(found[name, labels]))


def test_a_newline_in_a_label_or_a_help_makes_no_line():
    text = head("m", "gauge", "a\nm 7") + start_of("m", {"a": 'x"} 5\nm 6\\'}) + "1\n"
    assert len(text.splitlines()) == 3
    assert samples(text) == {("m", (("a", 'x"} 5\nm 6\\'),)): 1}


@given(st.lists(st.tuples(st.floats(0, 20) | st.sampled_from(BOUNDS), st.integers(1, 4))))
def test_a_histogram_is_as_prometheus_client_writes_it(values):
    registry = CollectorRegistry()
    theirs = Histogram("m", "A text.", ["engine"], buckets=BOUNDS, registry=registry).labels("0")
    family = Family("m", "histogram", "A text.")
    ours = OurHistogram(BOUNDS)
    family.series.append(HistogramSeries("m", BOUNDS, {"engine": "0"}, ours))
    for value, times in values:
        ours.add(value, times)
        for _ in range(times):
            theirs.observe(value)
    theirs_told = samples(generate_latest(registry).decode())
    expected = {key: value for key, value in theirs_told.items() if key[0] != "m_created"}
    found = samples("".join(family.text()))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-9)
    assert sum(ours.counts) == sum(times for _, times in values)
    assert all(ours.counts[bisect_left(BOUNDS, value)] for value, _ in values)


def test_no_value_yet():
    found = samples(head("m", "histogram", "t") + HistogramLines("m", BOUNDS, {"a": "b"}).text((), 0))
    assert set(found.values()) == {0} and len(found) == len(BOUNDS) + 3


def test_a_counter():
    family = Family("m_total", "counter", "t")
    family.series += [CounterSeries("m_total", {"reason": reason}) for reason in ("a", "b")]
    family.series[0].add()
    family.series[0].add(2)
    assert samples("".join(family.text())) == {("m_total", (("reason", "a"),)): 3, ("m_total", (("reason", "b"),)): 0}
