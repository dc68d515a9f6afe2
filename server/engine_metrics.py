"""The engine's state and the tiers' as metrics, made at scrape time from the last StepStats: a step costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapters_store.histogram import LOAD_BOUNDS_S, Counts
from adapters_store.store import StoreTier
from server.engine.messages import EngineReady, StepStats
from server.engine.tally import ADAPTER_BOUNDS, ROW_BOUNDS
from server.exposition import HistogramLines, Labels, head, number, start_of

ENGINE = "0"
LOAD_SECONDS = "multilora_adapter_load_seconds"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Where this side of the metrics comes from, read at each scrape."""

    stats: Callable[[], StepStats]
    ready: Callable[[], EngineReady]
    max_adapters: int  # distinct adapters in one step at most
    disk: Callable[[], StoreTier] = StoreTier


class EngineMetrics:
    """All families of one engine, with `labels`."""

    def __init__(self, labels: Labels, facts: EngineFacts) -> None:
        self._labels = labels
        self._facts = facts
        self._heads: dict[str, str] = {}  # by name: head and start of a family of one series
        self._rows = HistogramLines("vllm:iteration_tokens_total", ROW_BOUNDS, labels)
        self._adapters = HistogramLines("multilora_adapters_per_step", ADAPTER_BOUNDS, labels)
        self._loads: dict[tuple[str, str], HistogramLines] = {}  # by tier and phase

    def text(self) -> Iterator[str]:
        """Their part of the exposition."""
        stats, ready, disk = self._facts.stats(), self._facts.ready(), self._facts.disk()
        for name, text, value in _gauges(stats, ready):
            yield self._one(name, "gauge", text, value)
        for name, text, value in _counters(stats, disk):
            yield self._one(f"{name}_total", "counter", text, value)
        yield head("vllm:iteration_tokens_total", "histogram", "Token rows of a step.")
        yield self._rows.text(stats.steps_by_rows, stats.rows_total)
        yield head("multilora_adapters_per_step", "histogram", "Distinct adapters in a step.")
        yield self._adapters.text(stats.steps_by_adapters, stats.adapters_total)
        yield from self._tiers(stats, disk)
        yield head(LOAD_SECONDS, "histogram", "Seconds of bringing an adapter to a tier, by phase.")
        for tier, by_phase in (("raw", disk.raw.seconds), ("disk", disk.seconds), ("device", stats.load_seconds)):
            yield from self._phases(tier, by_phase)
        yield from self._cache_config(ready)
        yield from self._lora_info(stats)

    def _one(self, name: str, kind: str, text: str, value: float) -> str:
        """A family that has one series."""
        start = self._heads.get(name)
        if start is None:
            start = self._heads[name] = head(name, kind, text) + start_of(name, self._labels)
        return f"{start}{number(value)}\n"

    def _tiers(self, stats: StepStats, disk: StoreTier) -> Iterator[str]:
        raw = disk.raw
        tiers = ("raw", "disk", "host", "device")
        num_adapters = (raw.num_entries, disk.num_images, stats.host_images, stats.resident_adapters)
        num_bytes = (raw.num_bytes, disk.num_bytes, stats.host_bytes_used, stats.adapter_bytes_used)
        evictions = (raw.evictions, disk.evictions, stats.host_evictions, stats.adapter_evictions)
        for name, kind, text, values in (
            (
                "multilora_tier_adapters",
                "gauge",
                "Adapters in a tier; raw: as fetched, others: compiled.",
                num_adapters,
            ),
            ("multilora_tier_bytes", "gauge", "Bytes of adapters in a tier.", num_bytes),
            ("multilora_tier_evictions_total", "counter", "Adapters dropped from a tier.", evictions),
        ):
            yield head(name, kind, text)
            for tier, value in zip(tiers, values, strict=True):
                yield f"{start_of(name, {**self._labels, 'tier': tier})}{number(value)}\n"
        yield from self._uses_of_disk(disk)

    def _uses_of_disk(self, disk: StoreTier) -> Iterator[str]:
        """What the two tiers on disk keep for whom; both go back to 0 when nothing runs."""
        leases = (disk.raw.num_leases, disk.num_leases)
        under_way = (disk.raw.num_under_way, disk.num_under_way)
        for name, text, values in (
            ("multilora_tier_leases", "Uses under way that keep an adapter in a tier.", leases),
            ("multilora_tier_under_way", "Adapters on their way into a tier.", under_way),
        ):
            yield head(name, "gauge", text)
            for tier, value in zip(("raw", "disk"), values, strict=True):
                yield f"{start_of(name, {**self._labels, 'tier': tier})}{number(value)}\n"

    def _phases(self, tier: str, by_phase: Mapping[str, Counts]) -> Iterator[str]:
        for phase, times in sorted(by_phase.items()):
            lines = self._loads.get((tier, phase))
            if lines is None:
                labels = {**self._labels, "tier": tier, "phase": phase}
                lines = self._loads[tier, phase] = HistogramLines(LOAD_SECONDS, LOAD_BOUNDS_S, labels)
            yield lines.text(times.counts, times.total)

    def _cache_config(self, ready: EngineReady) -> Iterator[str]:
        name = "vllm:cache_config_info"
        shape = {"block_size": str(ready.block_size), "num_gpu_blocks": str(ready.num_kv_blocks)}
        yield head(name, "gauge", "The KV cache's shape.")
        yield f"{start_of(name, {**self._labels, **shape})}1\n"

    def _lora_info(self, stats: StepStats) -> Iterator[str]:
        """Exactly one series, whatever ran before: readers take the newest of a family by its value, a time."""
        name = "vllm:lora_requests_info"
        yield head(name, "gauge", "Adapters of running and of waiting requests; the value is the time of the scrape.")
        labels = {
            "max_lora": str(self._facts.max_adapters),
            "running_lora_adapters": ",".join(stats.running_adapters),
            "waiting_lora_adapters": ",".join(stats.waiting_adapters),
        }
        yield f"{start_of(name, labels)}{time.time()}\n"


def _gauges(stats: StepStats, ready: EngineReady) -> Sequence[tuple[str, str, float]]:
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


def _counters(stats: StepStats, disk: StoreTier) -> Sequence[tuple[str, str, float]]:
    old = "The old name of vllm:prefix_cache_"
    return (
        ("vllm:prefix_cache_queries", "Tokens asked of the prefix cache.", stats.prefix_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
        ("vllm:gpu_prefix_cache_queries", f"{old}queries_total, still read.", stats.prefix_queries),
        ("vllm:gpu_prefix_cache_hits", f"{old}hits_total, still read.", stats.prefix_hits),
        ("vllm:num_preemptions", "Requests put back for want of KV blocks.", stats.preemptions),
        ("multilora_adapter_acquires", "Times a request got its adapter's device slot.", stats.adapter_acquires),
        ("multilora_adapter_loads", "Adapters loaded into device memory.", stats.adapter_loads),
        ("multilora_adapter_host_hits", "Device loads served from host memory.", stats.host_hits),
        ("multilora_adapter_disk_hits", "Times an adapter asked for was compiled on disk already.", disk.hits),
        ("multilora_adapter_compiles", "Adapters compiled to disk.", disk.compiles),
        ("multilora_adapter_raw_hits", "Times that a remote adapter's files were on disk already.", disk.raw.hits),
        ("multilora_adapter_fetches", "Fetches of adapters from remote sources.", disk.raw.fetches),
        ("multilora_adapter_fetched_bytes", "Bytes of those fetches.", disk.raw.fetched_bytes),
        ("multilora_adapter_stale_uses", "Times an unconfirmed version was served.", disk.raw.stale_uses),
    )
