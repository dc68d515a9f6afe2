"""The engine's state and the tiers' as metrics, made at scrape time from the last StepStats: a step costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters_store.store import StoreTier
from server.engine.messages import EngineReady, StepStats
from server.engine.tally import ADAPTER_BOUNDS, ROW_BOUNDS

LABELS = ("model_name", "engine")
ENGINE = "0"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Where this side of the metrics comes from, read at each scrape."""

    stats: Callable[[], StepStats]
    ready: Callable[[], EngineReady]
    max_adapters: int  # distinct adapters in one step at most
    disk: Callable[[], StoreTier] = StoreTier


class EngineCollector(Collector):
    """All families of one engine; `labels` are the values of LABELS."""

    def __init__(self, labels: tuple[str, str], facts: EngineFacts) -> None:
        self._labels = labels
        self._facts = facts

    def describe(self) -> list[Metric]:
        """Nothing to check names by: registering must not need a running engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats, ready, disk = self._facts.stats(), self._facts.ready(), self._facts.disk()
        for name, text, value in _gauges(stats, ready):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, count in _counters(stats, disk):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, count)
            yield counter
        yield self._histogram(
            "vllm:iteration_tokens_total", "Token rows of a step.", ROW_BOUNDS, stats.steps_by_rows, stats.rows_total
        )
        yield self._histogram(
            "multilora_adapters_per_step",
            "Distinct adapters in a step.",
            ADAPTER_BOUNDS,
            stats.steps_by_adapters,
            stats.adapters_total,
        )
        yield from self._tiers(stats, disk)
        yield self._by_phase(disk.seconds, stats.load_seconds)
        yield self._cache_config(ready)
        yield self._lora_info(stats)

    def _histogram(self, name: str, text: str, bounds: Sequence[int], counts: Sequence[int], total: int) -> Metric:
        """`counts` by bound, not yet summed up; () before the first step."""
        family = HistogramMetricFamily(name, text, labels=LABELS)
        buckets, seen = [], 0
        for bound, count in zip((*map(float, bounds), "+Inf"), counts or (0,) * (len(bounds) + 1), strict=True):
            seen += count
            buckets.append((str(bound), seen))
        family.add_metric(self._labels, buckets, total)
        return family

    def _tiers(self, stats: StepStats, disk: StoreTier) -> Iterator[Metric]:
        labels = (*LABELS, "tier")
        images = GaugeMetricFamily("multilora_tier_adapters", "Compiled adapters in a tier.", labels=labels)
        held = GaugeMetricFamily("multilora_tier_bytes", "Bytes of compiled adapters in a tier.", labels=labels)
        evicted = CounterMetricFamily("multilora_tier_evictions", "Adapters dropped from a tier.", labels=labels)
        for tier, num_images, num_bytes, evictions in (
            ("disk", disk.num_images, disk.num_bytes, disk.evictions),
            ("host", stats.host_images, stats.host_bytes_used, stats.host_evictions),
            ("device", stats.resident_adapters, stats.adapter_bytes_used, stats.adapter_evictions),
        ):
            images.add_metric((*self._labels, tier), num_images)
            held.add_metric((*self._labels, tier), num_bytes)
            evicted.add_metric((*self._labels, tier), evictions)
        yield from (images, held, evicted)

    def _by_phase(self, disk: Mapping[str, float], device: Mapping[str, float]) -> Metric:
        """By multilora_adapter_compiles_total (disk) or multilora_adapter_loads_total (device): seconds of one."""
        family = CounterMetricFamily(
            "multilora_adapter_load_seconds",
            "Seconds spent on bringing adapters to a tier, by phase.",
            labels=(*LABELS, "tier", "phase"),
        )
        for tier, seconds in (("disk", disk), ("device", device)):
            for phase in sorted(seconds):
                family.add_metric((*self._labels, tier, phase), seconds[phase])
        return family

    def _cache_config(self, ready: EngineReady) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache's shape.", labels=(*LABELS, "block_size", "num_gpu_blocks")
        )
        family.add_metric((*self._labels, str(ready.block_size), str(ready.num_kv_blocks)), 1)
        return family

    def _lora_info(self, stats: StepStats) -> Metric:
        """Exactly one series, whatever ran before: readers take the newest of a family by its value, a time."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is the time of the scrape.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running, waiting = ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)
        family.add_metric((str(self._facts.max_adapters), running, waiting), time.time())
        return family


def _gauges(stats: StepStats, ready: EngineReady) -> tuple[tuple[str, str, float], ...]:
    return (
        ("vllm:num_requests_running", "Requests in the running set.", stats.num_running),
        ("vllm:num_requests_waiting", "Requests that wait to run, also for their adapter.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_usage),
        ("vllm:gpu_cache_usage_perc", "The old name of vllm:kv_cache_usage_perc, still read.", stats.kv_usage),
        ("multilora_step_rows", "Token rows of the last step.", stats.rows),
        ("multilora_step_adapter_rows", "Token rows of the last step that had an adapter.", stats.adapter_rows),
        ("multilora_step_adapters", "Distinct adapters in the last step.", stats.distinct_adapters),
        ("multilora_step_seconds", "Duration of the last step.", stats.step_s),
        ("multilora_adapter_capacity_bytes", "Device memory for adapters.", ready.adapter_bytes),
    )


def _counters(stats: StepStats, disk: StoreTier) -> tuple[tuple[str, str, float], ...]:
    return (
        ("vllm:prefix_cache_queries", "Tokens asked of the prefix cache.", stats.prefix_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
        ("vllm:num_preemptions", "Requests put back for want of KV blocks.", stats.preemptions),
        ("multilora_adapter_acquires", "Times a request got its adapter's device slot.", stats.adapter_acquires),
        ("multilora_adapter_loads", "Adapters loaded into device memory.", stats.adapter_loads),
        ("multilora_adapter_host_hits", "Device loads served from host memory.", stats.host_hits),
        ("multilora_adapter_compiles", "Adapters compiled to disk.", disk.compiles),
    )
