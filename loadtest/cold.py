"""From request to first token for adapters that the server has never seen, by phase."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.server_process import RunningServer, running_server
from loadtest.throughput import prepare_adapters

if TYPE_CHECKING:
    from loadtest.bench import Workload

PHASES_HEADER = {"x-multilora-phases": "1"}


def measure_cold(workload: Workload, folder: Path) -> dict[str, object]:
    """Each adapter's first request, alone on an idle server, then the same request warm; medians."""
    names = prepare_adapters(workload, folder)
    cold: list[dict[str, float]] = []
    warm: list[float] = []
    with running_server(workload.model, folder / "adapters", folder / "cache") as server:
        _first_token(server, workload, "base", 0)
        base = [_first_token(server, workload, "base", 1 + index)["total_s"] for index in range(5)]
        for index, name in enumerate(names[:12]):
            cold.append(_first_token(server, workload, name, 10 + index))
            warm.append(_first_token(server, workload, name, 50 + index)["total_s"])
    phases = sorted({phase for sample in cold for phase in sample} - {"total_s"})
    medians = {phase: statistics.median(sample.get(phase, 0.0) for sample in cold) for phase in phases}
    return {
        "adapter": f"rank {workload.rank}, all linear",
        "prompt tokens": workload.prompt_tokens,
        "first token, base, ms": statistics.median(base) * 1e3,
        "first token, warm adapter, ms": statistics.median(warm) * 1e3,
        "first token, adapter never seen, ms": statistics.median(s["total_s"] for s in cold) * 1e3,
        **{f"  of that, {phase}, ms": value * 1e3 for phase, value in medians.items()},
    }


def _first_token(server: RunningServer, workload: Workload, model: str, seed: int) -> dict[str, float]:
    """Seconds to the first streamed text, and the phases that the server reports."""
    start = 100 + 977 * seed
    body = {
        "model": model,
        "prompt": [3 + (start + 11 * position) % 40_000 for position in range(workload.prompt_tokens)],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    started = time.perf_counter()
    total_s = 0.0
    phases: dict[str, float] = {}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=PHASES_HEADER, timeout=120.0) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and not total_s:
                total_s = time.perf_counter() - started
            if chunk.get("usage"):
                phases = chunk["usage"].get("multilora", {}).get("phases", {})
    return {**phases, "total_s": total_s}
