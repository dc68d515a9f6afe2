"""What one GET /metrics costs the API process: CPU time of the exposition alone, with every family in it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.bench import Workload
    from server.metrics import Metrics

NUM_SCRAPES = 200
AIM_S = 0.002
NUM_ROUTES = 12  # of which each has had three classes of status


def measure_scrape(workload: Workload, folder: Path) -> dict[str, object]:
    """Median and 99th percentile of an exposition with traffic in every instrument."""
    metrics = _metrics(workload.num_adapters)
    times = sorted(_timed(metrics) for _ in range(NUM_SCRAPES))
    return {
        "exposition, bytes": len(metrics.exposition()),
        "median, ms of CPU": statistics.median(times) * 1e3,
        "99th percentile, ms of CPU": times[int(0.99 * NUM_SCRAPES)] * 1e3,
        "aim, ms": AIM_S * 1e3,
    }


def _metrics(num_adapters: int) -> Metrics:
    from adapters_store.histogram import PhaseTimes
    from adapters_store.store import StoreTier
    from server.engine.messages import EngineReady, StepStats
    from server.engine_metrics import EngineFacts
    from server.metrics import Metrics, RequestEnd, Siblings

    names = tuple(f"adapter-{index:03d}" for index in range(num_adapters))
    disk, device = PhaseTimes(), PhaseTimes()
    disk.add(dict.fromkeys(("queue", "fetch", "compile"), 0.1))
    device.add(dict.fromkeys(("queue", "header", "host", "device"), 0.1))
    stats = StepStats(num_running=len(names), running_adapters=names, load_seconds=device.seconds)
    ready = EngineReady(
        manifest_path="", max_model_len=1, vocab_size=1, eos_token_ids=(), num_kv_blocks=1, block_size=16,
        adapter_bytes=1, weights_bytes=1,
    )  # fmt: skip
    tier = StoreTier(seconds=disk.seconds)
    metrics = Metrics("base", EngineFacts(lambda: stats, lambda: ready, len(names), lambda: tier))
    metrics.first_token(100, 0.1)
    metrics.tokens(1, 0.01)
    end = RequestEnd(num_prompt=100, num_output=10, max_tokens=16, queue_s=0.1, prefill_s=0.1, decode_s=0.1)
    metrics.request_end("stop", 0.3, end)
    metrics.choice_end(Siblings(1), 10)
    for route in range(NUM_ROUTES):
        for status in (200, 400, 500):
            metrics.http.ended("POST", f"/v1/route-{route}", status, 0.1)
    return metrics


def _timed(metrics: Metrics) -> float:
    started = time.process_time()
    metrics.exposition()
    return time.process_time() - started
