"""`multilora bench store catalog`: thousands of adapters in a bucket against a few registered ones.

2,000 random all-linear adapters of ranks 2 to 8 are put into a bucket and each asked for once, untimed: after that
every image is on the server's disk. Two servers with the same budgets stand side by side: device memory for 32
adapters, host memory for 200. One has 32 adapters in a folder, the other all by the bucket. Closed loops by S-LoRA's
power law, the servers in turns and every other round backwards.

Where adapters were found is counted by the server, and what a find in a slower tier costs is measured on the idle one
(the load's own phases, a median). The prediction is a request's time with few adapters plus, for every tier, the share
of requests that found theirs there times that cost: as if no load ran beside a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.progress import track

from loadtest.catalog import read_counters, tier_figures
from loadtest.cold import first_token
from loadtest.dialects import Dialect
from loadtest.options import count, count_or_none, positive, result_folder
from loadtest.report import Figures
from loadtest.s3 import s3_server
from loadtest.serve import Plan, measure
from loadtest.server_process import RunningServer, running_server
from loadtest.store import BUCKET, part_parser, run_part, source_flags
from loadtest.workload import WorkloadSpec

if TYPE_CHECKING:
    from adapters_store.manifest import BaseManifest

RANKS = tuple(range(2, 9))  # of the adapters, in turn
GOAL = 0.9  # tokens/s of all over those of few, at this alpha
_GOALS_ALPHA = 0.1
_COMPILE_CLIENTS = 4
_NUM_CALIBRATED = 24  # adapters whose loads are timed, from each tier
_WARMUP_TOKENS = 4
_MAX_ID = 30_000  # of random prompts, where the base has as many


@dataclass(frozen=True)
class Bench:
    """The two servers, and the options."""

    few: RunningServer
    many: RunningServer
    names: list[str]
    options: argparse.Namespace
    console: Console

    def run(self, server: RunningServer, alpha: float, turn: int) -> Figures:
        """One closed loop over a server's adapters, with `tiers` of its requests."""
        names = self.names if server is self.many else self.names[: self.options.few]
        spec = _spec(self.options, len(names), alpha, turn)
        warmup = dataclasses.replace(spec, seed=spec.seed + (1 << 40), num_requests=self.options.warmup)
        if self.options.warmup:
            ask(server, dataclasses.replace(warmup, output_tokens=str(_WARMUP_TOKENS)), names, self.console)
        before = read_counters(server.url)
        result = ask(server, spec, names, self.console)
        return {**result, "tiers": tier_figures(before, read_counters(server.url))}


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = part_parser("catalog", __doc__)
    parser.add_argument("--adapters", type=count, default=2000, help="in the bucket")
    parser.add_argument("--few", type=count, default=32, help="of the other server; device memory is for as many")
    parser.add_argument("--host", type=count_or_none, default=200, help="adapters that host memory is for")
    parser.add_argument("--alphas", nargs="+", type=positive, default=[0.1, 0.3, 1.0])
    parser.add_argument("--num-requests", type=count, default=192, help="of each run")
    parser.add_argument("--concurrency", type=count, default=32)
    parser.add_argument("--repeats", type=count, default=2)
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--output-tokens", type=count, default=64)
    parser.add_argument("--warmup", type=count_or_none, default=64, help="requests before each run, not counted")
    parser.add_argument("--highest-id", type=count, help="of random prompts, not included; by the base's vocabulary")
    parser.add_argument("--folder", type=result_folder, help="keeps bucket and images for a later run")
    run_part("catalog", parser, arguments, measure_catalog)


def measure_catalog(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, object]:
    """All figures. Errors: RuntimeError where a server or a request fails, ValueError for sizes without sense."""
    from server.model.skeleton import read_config

    if not options.few < options.adapters:
        raise ValueError(f"--few {options.few} is to be below --adapters {options.adapters}")
    vocab_size = read_config(model).get_text_config().vocab_size
    options.highest_id = options.highest_id or min(_MAX_ID, vocab_size)
    with _servers(options, model, (options.folder or folder).resolve()) as bench:
        costs = tier_costs(bench, model)
        rounds: dict[float, list[tuple[Figures, Figures]]] = {alpha: [] for alpha in options.alphas}
        for turn in range(options.repeats):
            for alpha in options.alphas[:: -1 if turn % 2 else 1]:
                order = [bench.few, bench.many][:: -1 if turn % 2 else 1]
                found = [bench.run(server, alpha, turn) for server in order][:: -1 if turn % 2 else 1]
                rounds[alpha].append((found[0], found[1]))
    return {
        "room on the device / in host memory, adapters": f"{options.few} / {options.host}",
        **{f"a load from {tier}, ms": cost * 1e3 for tier, cost in costs.items()},
        **{f"power law {alpha:g}{_goal(alpha)}": table(found, costs) for alpha, found in rounds.items()},
    }


def table(rounds: Sequence[tuple[Figures, Figures]], costs: Mapping[str, float]) -> dict[str, dict[str, object]]:
    """Medians of few and all side by side, their ratio round by round, and the prediction."""
    both: Any = list(zip(*rounds, strict=True))
    shown = {
        "output tokens/s": "output_throughput",
        "time to first token p50, ms": "p50_ttft_ms",
        "p90": "p90_ttft_ms",
        "gap between tokens p50, ms": "p50_itl_ms",
        "p99 gap": "p99_itl_ms",
    }
    tiers = ("device", "host", "disk")
    keys = {**shown, **{f"found {tier}": f"hit_share_{tier}" for tier in tiers}, "compiles": "compiles"}
    flat = [[{**run, **run["tiers"]} for run in runs] for runs in both]
    rows: dict[str, dict[str, object]] = {
        label: {
            which: statistics.median(run[key] for run in runs) for which, runs in zip(("few", "all"), flat, strict=True)
        }
        for label, key in keys.items()
    }
    ratios = [many["output_throughput"] / few["output_throughput"] for few, many in zip(*flat, strict=True)]
    rows["output tokens/s"] |= {"ratio": statistics.median(ratios), "rounds": _listed(ratios)}
    predicted = [predict(few, many, costs) for few, many in zip(*flat, strict=True)]
    rows["tokens/s that the finds predict"] = {
        "all": statistics.median(predicted),
        "ratio": statistics.median(p / few["output_throughput"] for p, few in zip(predicted, flat[0], strict=True)),
    }
    return rows


def predict(few: Figures, many: Figures, costs: Mapping[str, float]) -> float:
    """Output tokens/s of all: a request's share of the time with few, plus what its finds in slower tiers cost more."""
    flat: Any = (few, many)
    added_s = sum((flat[1][f"hit_share_{tier}"] - flat[0][f"hit_share_{tier}"]) * cost for tier, cost in costs.items())
    per_request_s = 1 / flat[0]["request_throughput"]
    tokens: float = flat[0]["output_throughput"] * per_request_s
    return tokens / (per_request_s + added_s)


def tier_costs(bench: Bench, model: Path) -> dict[str, float]:
    """Seconds of a load from disk and from host memory on the idle server, medians over adapters."""
    from loadtest.bench import Workload

    few, workload = bench.options.few, Workload(model, prompt_tokens=8)
    timed, others = bench.names[few:][-_NUM_CALIBRATED:], bench.names[:few]
    seeds = itertools.count()
    seconds: dict[str, list[float]] = {}
    with httpx.Client(base_url=bench.many.url, timeout=120) as http:
        for tier in ("disk", "host"):
            for name in timed:
                phases = first_token(http, workload, name, next(seeds))
                loads = [phases[f"load_{phase}_s"] for phase in ("header", "host", "device") if "load_host_s" in phases]
                if loads:
                    seconds.setdefault(tier, []).append(sum(loads))
            for name in others:  # so many that all of `timed` leave the device
                first_token(http, workload, name, next(seeds))
    return {tier: statistics.median(found) for tier, found in seconds.items()}


@contextmanager
def _servers(options: argparse.Namespace, model: Path, folder: Path) -> Iterator[Bench]:
    """Both, their images on disk. The bucket is filled unless an earlier run in the same folder has done so."""
    from server.model.manifest import build_manifest

    console = Console(file=sys.stderr)
    manifest = build_manifest(model, "auto", folder / "hashes")
    names = [f"c{number:04d}" for number in range(options.adapters)]
    for name in ("s3", "none"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_few(folder / "few", manifest, names[: options.few])
    with s3_server(folder / "s3", volume_mb=1024, niceness=10) as bucket:
        is_new = not (folder / "bucket-is-filled").exists()
        if is_new:
            for seed, name in enumerate(track(names, "filling the bucket", console=console)):
                bucket.put(BUCKET, name, _adapter(manifest, seed))
            (folder / "bucket-is-filled").touch()
        flags = [*source_flags(options, poll_interval_s=60.0), "--raw-quota", "0"]
        caches = folder / "cache", folder / "cache-few"
        if not (folder / "images-are-made").exists():
            log = folder / "compiling.log"
            with running_server(model, folder / "none", caches[0], *flags, env=bucket.environment, log=log) as server:
                _compile(server, names, options, console)
            (folder / "images-are-made").touch()
        largest = max(path.stat().st_size for path in (caches[0] / "images").iterdir())
        room = ["--adapter-memory", str(options.few * largest), "--host-memory", str(options.host * largest)]
        own = ["--disable-access-log", *options.flags.split()]
        with ExitStack() as stack:
            log, env = folder / "few.log", bucket.environment
            few = stack.enter_context(running_server(model, folder / "few", caches[1], *own, *room, log=log))
            flags, log = [*flags, *room], folder / "many.log"
            many = stack.enter_context(running_server(model, folder / "none", caches[0], *flags, env=env, log=log))
            _compile(few, names[: options.few], options, console)
            yield Bench(few, many, names, options, console)


def _compile(server: RunningServer, names: Sequence[str], options: argparse.Namespace, console: Console) -> None:
    """Ask for each once."""
    spec = dataclasses.replace(
        _spec(options, len(names), 1.0, 0),
        num_requests=len(names),
        arrivals=f"closed:{_COMPILE_CLIENTS}",
        popularity="distinct",
        prompt_tokens="4",
        output_tokens="1",
    )
    console.print(f"bringing {len(names)} adapters to disk")
    ask(server, spec, names, console)


def ask(server: RunningServer, spec: WorkloadSpec, names: Sequence[str], console: Console) -> Figures:
    """Run it. Errors: RuntimeError if a request failed: what is left would be an easier workload."""
    result = measure(Plan(server.url, Dialect("openai", "base", names), spec, num_warmups=0), console)
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} of {spec.num_requests} requests failed: {result['error_counts']}")
    return result


def _spec(options: argparse.Namespace, num_adapters: int, alpha: float, turn: int) -> WorkloadSpec:
    return WorkloadSpec(
        seed=3000 + turn,
        num_requests=options.num_requests,
        arrivals=f"closed:{options.concurrency}",
        popularity=f"power:{alpha:g}",
        num_adapters=num_adapters,
        prompt_tokens=str(options.prompt_tokens),
        output_tokens=str(options.output_tokens),
        highest_id=options.highest_id,
    )


def _write_few(folder: Path, manifest: BaseManifest, names: Sequence[str]) -> None:
    """The first adapters, as a folder has them."""
    for seed, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, content in _adapter(manifest, seed).items():
            (folder / name / file).write_bytes(content)


def _adapter(manifest: BaseManifest, seed: int) -> dict[str, bytes]:
    from loadtest.adapters import random_adapter

    return random_adapter(manifest, RANKS[seed % len(RANKS)], seed)


def _goal(alpha: float) -> str:
    return f" (goal {GOAL})" if alpha == _GOALS_ALPHA else ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
