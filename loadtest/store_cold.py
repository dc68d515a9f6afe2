"""`multilora bench store cold`: adapters that are only in a bucket, asked for the first time.

First token by phase on an idle server whose compiler is warm, against a floor from the same run:

    fetch     the object by parallel ranged GETs and nothing else
    image     its file read, every tensor cast by way of fp32, and the result written: a plain script
    prefill   the same request to the same adapter once it is on the device

Then many cold adapters at once, while others stream: the gaps between their tokens against their step before.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np

from adapters_store.sources.folder import WEIGHTS_FILE
from loadtest.cold import first_token, phase_rows
from loadtest.options import count, count_or_none, lora_rank, positive
from loadtest.outcome import Outcome, read_outcome
from loadtest.s3 import S3Server, s3_server
from loadtest.server_process import RunningServer, process_times, running_server
from loadtest.store import BUCKET, part_parser, run_part, source_flags
from loadtest.wire import Target, exchange, resolve

if TYPE_CHECKING:
    from obstore.store import S3Store

    from adapters_store.manifest import BaseManifest
    from loadtest.bench import Workload

PART_BYTES = 8 << 20
_SHORT_PROMPT = 8  # tokens: what is measured is not the work on prompts
_TIMEOUT_S = 300.0


@dataclass
class Sizes:
    """What was measured for one rank; seconds, adapter by adapter."""

    num_bytes: int
    cold: list[dict[str, float]] = field(default_factory=list)
    fetch: list[float] = field(default_factory=list)
    image: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Medians in ms, and the ratio of the medians."""
        total = statistics.median(sample["total_s"] for sample in self.cold)
        parts = [statistics.median(of) for of in (self.fetch, self.image, self.prefill)]
        floor = sum(parts)
        return {
            "MB": self.num_bytes / 1e6,
            "cold, ms": total * 1e3,
            "floor, ms": floor * 1e3,
            "ratio": total / floor,
            **{f"floor's {what}, ms": s * 1e3 for what, s in zip(("fetch", "image", "prefill"), parts, strict=True)},
            "fetch, MB/s": self.num_bytes / 1e6 / parts[0],
        }


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = part_parser("cold", __doc__)
    parser.add_argument("--rank", type=lora_rank, nargs="+", default=[4, 16, 64])
    parser.add_argument("--num-adapters", type=count, default=8, help="of each rank")
    parser.add_argument(
        "--at-once", type=count_or_none, default=50, help="cold adapters of the first rank above 4; 0: none"
    )
    parser.add_argument("--streams", type=count, default=8, help="that run meanwhile")
    parser.add_argument("--stream-tokens", type=count, default=400, help="of each, before the next one")
    parser.add_argument("--quiet", type=positive, default=8.0, help="seconds of streams alone, to compare with")
    run_part("cold", parser, arguments, measure)


def measure(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, object]:
    """All figures. Errors: RuntimeError where a server or a request fails."""
    from loadtest.adapters import random_adapter
    from loadtest.bench import Workload
    from server.model.manifest import build_manifest

    manifest = build_manifest(model, "auto", folder / "hashes")
    workload = Workload(model, ranks=tuple(options.rank))
    figures: dict[str, object] = {}
    for name in ("s3", "none"):
        (folder / name).mkdir()
    with s3_server(folder / "s3", volume_mb=1024, niceness=10) as bucket:
        names = {rank: [f"r{rank}-{n}" for n in range(options.num_adapters + 1)] for rank in options.rank}
        for rank, of_rank in names.items():
            for seed, name in enumerate(of_rank):
                bucket.put(BUCKET, name, random_adapter(manifest, rank, seed))
        burst = _put_burst(bucket, manifest, options)
        cache, flags = folder / "cache", source_flags(options)
        log = folder / "server.log"
        with running_server(model, folder / "none", cache, *flags, env=bucket.environment, log=log) as server:
            sizes = _one_by_one(server, bucket, workload, names, folder)
            figures["first token, against its floor"] = {f"rank {rank}": found.row() for rank, found in sizes.items()}
            figures["by phase, ms"] = phase_rows({rank: found.cold for rank, found in sizes.items()})
            if burst:
                warm = [name for of_rank in names.values() for name in of_rank[1:]]
                short = dataclasses.replace(workload, prompt_tokens=_SHORT_PROMPT)
                streams = _Streams(resolve(server.url), short, options.stream_tokens)
                asked = asyncio.run(streams.measure(server, warm[: options.streams], burst, options.quiet))
                figures |= {f"{len(burst)} cold adapters at once: {label}": value for label, value in asked.items()}
    return figures


def _put_burst(bucket: S3Server, manifest: BaseManifest, options: argparse.Namespace) -> list[str]:
    """Adapters that are all asked for together; their names."""
    from loadtest.adapters import random_adapter

    rank = next((rank for rank in options.rank if rank > 4), options.rank[0])
    names = [f"burst-{number}" for number in range(options.at_once)]
    for seed, name in enumerate(names, 1000):
        bucket.put(BUCKET, name, random_adapter(manifest, rank, seed))
    return names


def _one_by_one(
    server: RunningServer, bucket: S3Server, workload: Workload, names: dict[int, list[str]], folder: Path
) -> dict[int, Sizes]:
    """Every adapter cold and then warm, the ranks in turn; the first of each rank isn't counted."""
    store = bucket.store(BUCKET)
    sizes = {rank: Sizes(store.head(f"{of_rank[0]}/{WEIGHTS_FILE}")["size"]) for rank, of_rank in names.items()}
    seeds = itertools.count()
    with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S) as http:
        for model in ("base", "base", *(of_rank[0] for of_rank in names.values())):
            first_token(http, workload, model, next(seeds))
        for together in zip(*(of_rank[1:] for of_rank in names.values()), strict=True):
            for found, name in zip(sizes.values(), together, strict=True):
                found.cold.append(first_token(http, workload, name, next(seeds)))
                seconds, content = asyncio.run(ranged_get(store, f"{name}/{WEIGHTS_FILE}", found.num_bytes))
                found.fetch.append(seconds)
                (folder / "object").write_bytes(content)
                found.image.append(plain_image(folder / "object", folder / "image"))
                found.prefill.append(first_token(http, workload, name, next(seeds))["total_s"])
    return sizes


async def ranged_get(store: S3Store, path: str, num_bytes: int) -> tuple[float, bytes]:
    """Seconds of all parts of an object at once, and its content."""
    started = time.perf_counter()
    starts = range(0, num_bytes, PART_BYTES)
    ends = [min(start + PART_BYTES, num_bytes) for start in starts]
    parts = await asyncio.gather(
        *(store.get_range_async(path, start=start, end=end) for start, end in zip(starts, ends, strict=True))
    )
    seconds = time.perf_counter() - started
    return seconds, b"".join(bytes(part) for part in parts)


def plain_image(weights: Path, image: Path) -> float:
    """Seconds to read a file of bf16 tensors, take each to fp32 and back, and write what comes of it."""
    import torch
    from safetensors.torch import load

    torch.set_num_threads(1)  # others have the processor too
    started = time.perf_counter()
    tensors = load(weights.read_bytes())
    with image.open("wb", buffering=0) as file:
        for tensor in tensors.values():
            cast = (tensor.float() * 2.0).to(torch.bfloat16)
            file.write(memoryview(cast.view(torch.uint8).numpy().reshape(-1)))
    return time.perf_counter() - started


# --- many at once ---


@dataclass
class _Streams:
    """Warm adapters' streams, each followed by another one until the end, and what comes beside them."""

    target: Target
    workload: Workload
    num_tokens: int  # of one stream
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: bool = False

    async def measure(
        self, server: RunningServer, names: Sequence[str], burst: Sequence[str], quiet_s: float
    ) -> dict[str, object]:
        """Streams of `names` alone, then with all of `burst` asked for at once, until each of these has answered.

        Errors: RuntimeError where a request fails.
        """
        running = [asyncio.create_task(self._stream(name, seed)) for seed, name in enumerate(names)]
        await asyncio.sleep(2.0)
        quiet = time.perf_counter()
        await asyncio.sleep(quiet_s)
        before, started = process_times(server.pid), time.perf_counter()
        answers = await asyncio.gather(*(self._ask(name, seed, 1) for seed, name in enumerate(burst, 10_000)))
        ended, after = time.perf_counter(), process_times(server.pid)
        self.is_over = True
        await asyncio.gather(*running)
        failed = [outcome.error for outcome in (*answers, *self.outcomes) if outcome.error]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        alone = spread(gaps_within(self.outcomes, quiet, started))
        beside = spread(gaps_within(self.outcomes, started, ended))
        waits = [outcome.ttft_s or 0.0 for outcome in answers]
        return {
            "streams beside them": len(names),
            "all answered after, s": ended - started,
            "first token, median / last, s": f"{statistics.median(waits):.2f} / {max(waits):.2f}",
            **{f"others' {kind} gap before, ms": value for kind, value in alone.items()},
            **{f"others' {kind} gap meanwhile, ms": value for kind, value in beside.items()},
            "p99 gap meanwhile over the median before (goal 2)": beside["p99"] / alone["median"],
            **{f"CPU of {name} meanwhile, s": after[name] - before[name] for name in after},
        }

    async def _stream(self, name: str, seed: int) -> None:
        for turn in itertools.count():
            if self.is_over:
                return
            self.outcomes.append(await self._ask(name, 100 * seed + turn, self.num_tokens))

    async def _ask(self, name: str, seed: int, max_tokens: int) -> Outcome:
        prompt = self.workload.prompt(977 * seed)
        body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        encoded = json.dumps({**body, "ignore_eos": True, "stream": True, "return_token_ids": True}).encode()
        request = self.target.encode("/v1/completions", encoded)
        done = await exchange(self.target, request, time.perf_counter(), _TIMEOUT_S)
        return read_outcome(done, Outcome(0, None, max_tokens, done.due, done.begun, done.ended))


def gaps_within(outcomes: Sequence[Outcome], start: float, stop: float) -> list[float]:
    """Seconds between tokens of one stream where the later one came within [start, stop)."""
    pairs = (pair for outcome in outcomes for pair in itertools.pairwise(outcome.stamps))
    return [after - before for before, after in pairs if start <= after < stop]


def spread(gaps: Sequence[float]) -> dict[str, float]:
    """In ms. Errors: RuntimeError where no stream had two tokens."""
    if not gaps:
        raise RuntimeError("the streams had no tokens in time; ask for more adapters at once")
    found = np.asarray(gaps) * 1e3
    return {"median": float(np.median(found)), "p99": float(np.percentile(found, 99)), "longest": float(found.max())}
