"""Every Prometheus metric, in one place: the vllm:* names that routers and dashboards read, and multilora_*.

Gauges and the engine's counters are made at scrape time from the last StepStats, so a step costs nothing
here; the request metrics are counted as requests go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import EngineReady, StepStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
_ENGINE = "0"
_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Where the engine's side of the metrics comes from, read at each scrape."""

    stats: Callable[[], StepStats]
    ready: Callable[[], EngineReady]
    max_adapters: int  # distinct adapters in one step at most


class Metrics:
    """The instruments of one server. `registry` is the server's own; two servers never share one."""

    def __init__(self, registry: CollectorRegistry, model_name: str, facts: EngineFacts) -> None:
        self._registry = registry
        self._labels = (model_name, _ENGINE)
        prompt = Counter("vllm:prompt_tokens", "Prompt tokens of requests that started.", _LABELS, registry=registry)
        generated = Counter("vllm:generation_tokens", "Tokens generated.", _LABELS, registry=registry)
        ttft = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _LABELS,
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its end.",
            _LABELS,
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        ends = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self._prompt_tokens = prompt.labels(*self._labels)
        self._generation_tokens = generated.labels(*self._labels)
        self._ttft = ttft.labels(*self._labels)
        self._latency = latency.labels(*self._labels)
        self._ends = {reason: ends.labels(*self._labels, reason) for reason in FINISH_REASONS}
        registry.register(_EngineCollector(self._labels, facts))

    def first_token(self, num_prompt_tokens: int, ttft_s: float) -> None:
        """A request's first output came."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._ttft.observe(ttft_s)

    def tokens(self, count: int) -> None:
        """`count` tokens were generated."""
        self._generation_tokens.inc(count)

    def request_end(self, reason: str, latency_s: float) -> None:
        """A request that the engine had ended: one of FINISH_REASONS."""
        self._ends[reason].inc()
        self._latency.observe(latency_s)

    def exposition(self) -> bytes:
        """What GET /metrics answers."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's state as metrics, from its last StepStats."""

    def __init__(self, labels: tuple[str, str], facts: EngineFacts) -> None:
        self._labels = labels
        self._facts = facts

    def describe(self) -> list[Metric]:
        """Nothing to check names by: registering must not need a running engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats, ready = self._facts.stats(), self._facts.ready()
        for name, text, value in _gauges(stats, ready):
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in _counters(stats):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        yield self._cache_config(ready)
        yield self._lora_info(stats)

    def _cache_config(self, ready: EngineReady) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's shape.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks"),
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
        (
            "vllm:num_requests_waiting",
            "Requests that wait to run, also for their adapter.",
            stats.num_waiting,
        ),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_usage),
        ("multilora_step_rows", "Token rows of the last step.", stats.rows),
        (
            "multilora_step_adapter_rows",
            "Token rows of the last step that had an adapter.",
            stats.adapter_rows,
        ),
        ("multilora_step_adapters", "Distinct adapters in the last step.", stats.distinct_adapters),
        ("multilora_step_seconds", "Duration of the last step.", stats.step_s),
        ("multilora_resident_adapters", "Adapters in device memory.", stats.resident_adapters),
        ("multilora_adapter_bytes", "Device memory used by adapters.", stats.adapter_bytes_used),
        ("multilora_adapter_capacity_bytes", "Device memory for adapters.", ready.adapter_bytes),
    )


def _counters(stats: StepStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("vllm:prefix_cache_queries", "Tokens asked of the prefix cache.", stats.prefix_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
        ("vllm:num_preemptions", "Requests put back for want of KV blocks.", stats.preemptions),
        ("multilora_adapter_loads", "Adapters loaded into device memory.", stats.adapter_loads),
        ("multilora_adapter_evictions", "Adapters dropped from device memory.", stats.adapter_evictions),
    )
