"""From request to first token on an idle server: the base, warm adapters, and adapters never seen, by phase."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.server_process import running_server
from loadtest.throughput import prepare_adapters

if TYPE_CHECKING:
    from loadtest.bench import Workload

PHASES_HEADER = {"x-multilora-phases": "1"}
NUM_COLD = 12  # adapters of each rank
NUM_WARM = 12  # rounds of the base and of each rank in turn, times `repeats`


def measure_cold(workload: Workload, folder: Path) -> dict[str, object]:
    """Each adapter's first request, then rounds of requests for the base and a warm adapter of each rank; medians."""
    of_rank = dataclasses.replace(workload, num_adapters=min(NUM_COLD, workload.num_adapters))
    names = {
        rank: prepare_adapters(dataclasses.replace(of_rank, ranks=(rank,)), folder, f"rank-{rank}")
        for rank in workload.ranks
    }
    seeds = itertools.count()
    cold: dict[int, list[dict[str, float]]] = {rank: [] for rank in names}
    with (
        running_server(workload.model, folder / "adapters", folder / "cache") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        for _ in range(3):
            first_token(http, workload, "base", next(seeds))
        for together in zip(*names.values(), strict=True):
            for rank, name in zip(names, together, strict=True):
                cold[rank].append(first_token(http, workload, name, next(seeds)))
        rounds = [*_warm_rounds(http, workload, names, seeds)]
    columns = list(zip(*rounds, strict=True))  # seconds of the base, then of each rank
    return {
        "prompt tokens": workload.prompt_tokens,
        "requests of each kind, warm / never seen": f"{len(rounds)} / {of_rank.num_adapters}",
        "first token": {
            "base": _warm_row(columns[0], columns[0]),
            **{
                f"rank {rank}, all linear": _warm_row(times, columns[0])
                for rank, times in zip(names, columns[1:], strict=True)
            },
        },
        "first token of an adapter never seen, ms": phase_rows(cold),
    }


def _warm_rounds(
    http: httpx.Client, workload: Workload, names: dict[int, list[str]], seeds: Iterator[int]
) -> Iterator[list[float]]:
    """Seconds of a request to the base and to an adapter of each rank, every other round backwards."""
    for number in range(NUM_WARM * workload.repeats):
        kinds = ["base", *(of_rank[number % len(of_rank)] for of_rank in names.values())]
        times = [
            first_token(http, workload, kind, next(seeds))["total_s"] for kind in kinds[:: -1 if number % 2 else 1]
        ]
        yield times[:: -1 if number % 2 else 1]


def _warm_row(times: tuple[float, ...], base: tuple[float, ...]) -> dict[str, float]:
    ratios = [time / by for time, by in zip(times, base, strict=True)]
    return {
        "warm, ms": statistics.median(times) * 1e3,
        "over the base": statistics.median(times) / statistics.median(base),
        "median of the rounds' ratios": statistics.median(ratios),
    }


def phase_rows(cold: dict[int, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians in ms by rank: of the whole, and of each phase that the server reports."""
    phases = sorted({phase for samples in cold.values() for sample in samples for phase in sample} - {"total_s"})
    return {
        "all" if phase == "total_s" else phase: {
            f"rank {rank}": statistics.median(sample.get(phase, 0.0) for sample in samples) * 1e3
            for rank, samples in cold.items()
        }
        for phase in ("total_s", *phases)
    }


def first_token(http: httpx.Client, workload: Workload, model: str, seed: int) -> dict[str, float]:
    """Seconds to the first streamed text as `total_s`, and the phases that the server reports."""
    body = {
        "model": model,
        "prompt": workload.prompt(100 + 977 * seed),
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
    with http.stream("POST", "/v1/completions", json=body, headers=PHASES_HEADER) as response:
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
