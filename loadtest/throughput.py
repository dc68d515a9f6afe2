"""Tokens per second over HTTP with adapters and without, and what the processes hold in memory."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.adapters import write_random_adapter
from loadtest.server_process import RunningServer, running_server

if TYPE_CHECKING:
    from loadtest.bench import Workload


def prepare_adapters(workload: Workload, folder: Path, prefix: str = "bench") -> list[str]:
    """Write the workload's random adapters below `folder`; their names."""
    from server.model.manifest import build_manifest

    manifest = build_manifest(workload.model, "auto", folder / "hashes")
    names = [f"{prefix}-{index:03d}" for index in range(workload.num_adapters)]
    for index, name in enumerate(names):
        write_random_adapter(folder / "adapters" / name, manifest, workload.rank, seed=index)
    return names


def measure_throughput(workload: Workload, folder: Path) -> dict[str, object]:
    """One wave of concurrent requests, one adapter each or none, the two in turn; medians."""
    names = prepare_adapters(workload, folder)
    flags = ("--max-num-seqs", str(max(32, len(names))))
    with running_server(workload.model, folder / "adapters", folder / "cache", *flags) as server:
        asyncio.run(_wave(server, workload, list(names), seed=99))  # every image compiled and resident
        rates: dict[str, list[float]] = {"base": [], "adapters": []}
        for repeat in range(workload.repeats):
            rates["base"].append(asyncio.run(_wave(server, workload, ["base"] * len(names), seed=repeat)))
            rates["adapters"].append(asyncio.run(_wave(server, workload, list(names), seed=repeat)))
    base, full = statistics.median(rates["base"]), statistics.median(rates["adapters"])
    return {
        "concurrent requests": len(names),
        "prompt / output tokens": f"{workload.prompt_tokens} / {workload.output_tokens}",
        "output tokens/s without adapters": base,
        "output tokens/s with one adapter each": full,
        "ratio with / without": full / base,
        "runs without": str([round(rate, 1) for rate in rates["base"]]),
        "runs with": str([round(rate, 1) for rate in rates["adapters"]]),
    }


def measure_memory(workload: Workload, folder: Path) -> dict[str, object]:
    """Resident memory of each process, after a wave with every adapter in use."""
    names = prepare_adapters(workload, folder)
    with running_server(workload.model, folder / "adapters", folder / "cache") as server:
        at_start = server.memory_bytes()
        asyncio.run(_wave(server, workload, list(names), seed=1))
        after = server.memory_bytes()
        start_s = server.start_s
    weights = sum(path.stat().st_size for path in workload.model.glob("*.safetensors"))
    return {
        "start to serving, s": start_s,
        "API process at start / after the wave, MB": f"{at_start['api'] / 1e6:.0f} / {after['api'] / 1e6:.0f}",
        "engine process at start / after, MB": f"{at_start['engine'] / 1e6:.0f} / {after['engine'] / 1e6:.0f}",
        "worker process, MB": after.get("worker", 0) / 1e6,
        "weights' own bytes, MB": weights / 1e6,
        "engine over the weights after the wave, MB": (after["engine"] - weights) / 1e6,
    }


async def _wave(server: RunningServer, workload: Workload, models: list[str], seed: int) -> float:
    """All requests at once; output tokens per second from the first send to the last byte."""
    timeout = httpx.Timeout(600.0)
    limits = httpx.Limits(max_connections=len(models))
    async with httpx.AsyncClient(base_url=server.url, timeout=timeout, limits=limits) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(
            *(_complete(client, workload, model, seed, index) for index, model in enumerate(models))
        )
        return sum(counts) / (time.perf_counter() - started)


async def _complete(client: httpx.AsyncClient, workload: Workload, model: str, seed: int, index: int) -> int:
    body = {
        "model": model,
        "prompt": workload.prompt(100 + 4001 * seed + 131 * index),
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    count: int = response.json()["usage"]["completion_tokens"]
    return count
