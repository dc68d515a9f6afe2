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
AIM_S = 0.002  # a router asks up to 20 times a second


def measure_scrape(workload: Workload, folder: Path) -> dict[str, object]:
    """Median and 99th percentile of an exposition with traffic in every instrument."""
    from prometheus_client import CollectorRegistry

    from server.engine.messages import EngineReady, StepStats
    from server.engine_metrics import EngineFacts
    from server.metrics import Metrics, RequestEnd

    names = tuple(f"adapter-{index:03d}" for index in range(workload.num_adapters))
    stats = StepStats(num_running=len(names), running_adapters=names, load_seconds={"host": 1.0, "device": 1.0})
    ready = EngineReady(
        manifest_path="", max_model_len=1, vocab_size=1, eos_token_ids=(), num_kv_blocks=1, block_size=16,
        adapter_bytes=1, weights_bytes=1,
    )  # fmt: skip
    metrics = Metrics(CollectorRegistry(), "base", EngineFacts(lambda: stats, lambda: ready, len(names)))
    metrics.first_token(100, 0.1)
    metrics.tokens(1, 0.01)
    end = RequestEnd(num_prompt=100, num_output=10, max_tokens=16, queue_s=0.1, prefill_s=0.1, decode_s=0.1)
    metrics.request_end("stop", 0.3, end)
    times = sorted(_timed(metrics) for _ in range(NUM_SCRAPES))
    return {
        "exposition, bytes": len(metrics.exposition()),
        "median, ms of CPU": statistics.median(times) * 1e3,
        "99th percentile, ms of CPU": times[int(0.99 * NUM_SCRAPES)] * 1e3,
        "aim, ms": AIM_S * 1e3,
    }


def _timed(metrics: Metrics) -> float:
    started = time.process_time()
    metrics.exposition()
    return time.process_time() - started
