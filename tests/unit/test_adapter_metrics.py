"""Counters by adapter: bounded in number, never back, together always what was counted; the busy ones are shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from prometheus_client.parser import text_string_to_metric_families

from server import adapter_metrics
from server.adapter_metrics import HALF_LIFE_S, MARGIN, OTHER, RANK_S, AdapterMetrics

LABELS = {"model_name": "base", "engine": "0"}
COUNTERS = ("requests_total", "errors_total", "prompt_tokens_total", "output_tokens_total", "loads_total")
SERIES = (*COUNTERS, "ttft_seconds_sum", "ttft_seconds_count")


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scraped(metrics: AdapterMetrics) -> dict[str, dict[str, float]]:
    """Value by series and adapter, as a Prometheus reads it."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families("".join(metrics.text())):
        assert family.type == ("summary" if "ttft" in family.name else "counter")
        for sample in family.samples:
            of = found.setdefault(sample.name.removeprefix("multilora_by_adapter_"), {})
            assert sample.labels.items() >= LABELS.items() and sample.labels["adapter"] not in of
            of[sample.labels["adapter"]] = sample.value
    assert set(found) == set(SERIES)
    return found


def use(metrics: AdapterMetrics, name: str, num_tokens: int) -> None:
    metrics.of(name).generated(num_tokens)


def test_what_is_counted(clock):
    metrics = AdapterMetrics(2, LABELS, clock)
    first = metrics.of("a/b")
    first.started(7, 0.25)
    first.generated(3)
    first.generated(2)
    first.ended(is_error=False)
    second = metrics.of("a/b")
    second.started(1, 0.5)
    second.ended(is_error=True)
    metrics.of("a/b").loaded()
    metrics.of("c").ended(is_error=True)
    found = scraped(metrics)
    told = {name: tuple(found[name][label] for label in ("a/b", "c", OTHER)) for name in SERIES}
    assert told == {
        "requests_total": (2, 1, 0),
        "errors_total": (1, 1, 0),
        "prompt_tokens_total": (8, 0, 0),
        "output_tokens_total": (5, 0, 0),
        "loads_total": (1, 0, 0),
        "ttft_seconds_sum": (0.75, 0, 0),
        "ttft_seconds_count": (2, 0, 0),
    }


def test_without_places_all_is_other(clock):
    metrics = AdapterMetrics(0, LABELS, clock)
    use(metrics, "a", 3)
    use(metrics, "b", 4)
    clock.now += RANK_S
    assert scraped(metrics)["output_tokens_total"] == {OTHER: 7}


def test_an_adapter_called_other_counts_to_other(clock):
    metrics = AdapterMetrics(2, LABELS, clock)
    for name in (OTHER, "a", "b"):
        use(metrics, name, 5)
    assert scraped(metrics)["output_tokens_total"] == {"a": 5, "b": 5, OTHER: 5}
    use(metrics, OTHER, 1000)
    clock.now += RANK_S
    assert scraped(metrics)["output_tokens_total"] == {"a": 5, "b": 5, OTHER: 1005}


def test_places_go_to_the_busy_and_what_was_counted_stays_counted(clock):
    metrics = AdapterMetrics(2, LABELS, clock)
    use(metrics, "early", 100)
    use(metrics, "steady", 1000)
    running = metrics.of("early")
    use(metrics, "late", 500)
    assert scraped(metrics)["output_tokens_total"] == {"early": 100, "steady": 1000, OTHER: 500}
    clock.now += RANK_S
    assert scraped(metrics)["output_tokens_total"] == {"steady": 1000, "late": 0, OTHER: 600}
    running.generated(7)  # a request that goes on
    use(metrics, "late", 30)
    assert scraped(metrics)["output_tokens_total"] == {"steady": 1000, "late": 30, OTHER: 607}


def test_a_place_is_kept_against_a_little_more_use_and_within_the_minute(clock):
    metrics = AdapterMetrics(1, LABELS, clock)
    use(metrics, "a", 100)
    use(metrics, "b", int(100 * MARGIN))
    clock.now += RANK_S
    assert set(scraped(metrics)["loads_total"]) == {"a", OTHER}
    use(metrics, "b", 300)
    clock.now += RANK_S - 1
    assert set(scraped(metrics)["loads_total"]) == {"a", OTHER}
    clock.now += 1
    assert set(scraped(metrics)["loads_total"]) == {"b", OTHER}


def test_use_long_ago_counts_less(clock):
    metrics = AdapterMetrics(1, LABELS, clock)
    use(metrics, "a", 1000)
    clock.now += RANK_S
    use(metrics, "b", 600)
    scraped(metrics)
    for _ in range(int(2 * HALF_LIFE_S / RANK_S)):
        clock.now += RANK_S
        scraped(metrics)
    use(metrics, "b", 400)
    clock.now += RANK_S
    assert set(scraped(metrics)["loads_total"]) == {"b", OTHER}


def test_names_are_forgotten_but_not_what_they_counted(clock, monkeypatch):
    monkeypatch.setattr(adapter_metrics, "MAX_KNOWN", 8)
    metrics = AdapterMetrics(2, LABELS, clock)
    running = metrics.of("running")
    forgotten = [metrics.of(f"n{index}") for index in range(100)]
    assert len(metrics._known) == 8
    for tally in (running, *forgotten):
        tally.generated(1)
    found = scraped(metrics)["output_tokens_total"]
    assert found == {"running": 1, "n0": 1, OTHER: 99}
    assert metrics.of("running") is running, "who has a place is remembered"


class Machine(RuleBasedStateMachine):
    """Any use at any time, with a ranking at every scrape that is a minute after the last."""

    TOP = 2
    NAMES = ("a", "b", "c", "d", "e", OTHER)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.metrics = AdapterMetrics(self.TOP, LABELS, self.clock)
        self.counted = dict.fromkeys(SERIES, 0.0)
        self.open: list = []
        self.before: dict[str, dict[str, float]] = {}

    @rule(name=st.sampled_from(NAMES), num_prompt=st.integers(0, 50), ttft_s=st.floats(0, 100))
    def start(self, name, num_prompt, ttft_s):
        tally = self.metrics.of(name)
        tally.started(num_prompt, ttft_s)
        self.open.append(tally)
        self.counted["prompt_tokens_total"] += num_prompt
        self.counted["ttft_seconds_sum"] += round(ttft_s * 1e6) / 1e6
        self.counted["ttft_seconds_count"] += 1

    @rule(data=st.data(), count=st.integers(0, 200))
    def generate(self, data, count):
        if self.open:
            data.draw(st.sampled_from(self.open)).generated(count)
            self.counted["output_tokens_total"] += count

    @rule(is_error=st.booleans())
    def end(self, is_error):
        if self.open:
            self.open.pop(0).ended(is_error=is_error)
            self.counted["requests_total"] += 1
            self.counted["errors_total"] += is_error

    @rule(name=st.sampled_from(NAMES))
    def load(self, name):
        self.metrics.of(name).loaded()
        self.counted["loads_total"] += 1

    @rule(seconds=st.sampled_from([0.1, 30.0, RANK_S, 10 * HALF_LIFE_S]))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def scrape(self):
        found = scraped(self.metrics)
        for series, values in found.items():
            assert set(values) == set(found["loads_total"]) and OTHER in values and len(values) <= self.TOP + 1
            assert sum(values.values()) == pytest.approx(self.counted[series], rel=0, abs=1e-7)
            for adapter, value in values.items():
                assert value >= self.before.get(series, {}).get(adapter, 0), (series, adapter)
        self.before = found


@pytest.mark.parametrize("num_known", [3, 4096])
def test_any_use_keeps_every_series_rising_and_their_sum_right(num_known, monkeypatch):
    monkeypatch.setattr(adapter_metrics, "MAX_KNOWN", num_known)
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 10_000), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_after_a_quiet_while_the_most_used_have_the_places(uses):
    """Whoever has more than MARGIN times the tokens of one that is shown is shown itself."""
    clock = Clock()
    metrics = AdapterMetrics(3, LABELS, clock)
    for name in ("x1", "x2", "x3"):
        use(metrics, name, 100_000)
    for quiet_s in (RANK_S, 100 * HALF_LIFE_S):
        clock.now += quiet_s
        scraped(metrics)
    for name, num_tokens in uses.items():
        use(metrics, name, num_tokens)
    clock.now += RANK_S
    shown = set(scraped(metrics)["loads_total"]) - {OTHER}
    least = min(uses.get(name, 0) for name in shown)
    assert all(name in shown or num_tokens <= MARGIN * max(least, 1e-9) for name, num_tokens in uses.items())
