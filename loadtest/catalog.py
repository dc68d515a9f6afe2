"""`multilora bench catalog`: what a large catalog costs, and what real mixes of base and adapters do.

    multilora bench catalog --repeats 3 --out RESULTS

1,000 random all-linear adapters of ranks 4 to 8 are written and compiled once, untimed. The base's capacity is
measured in a closed loop; then every scenario gets Poisson arrivals at a share of it, on a server of its own
with the same flags, in turns and every other round backwards:

    catalog   32 registered adapters and all of them, asked for by S-LoRA's power law
    mixes     base only, one adapter with 90 % of the traffic, 90 % base with 10 % over 32 adapters

All scenarios of a round have the same arrival times and prompts. Not counted are each server's first requests: one for
every adapter that it has, so that the device is as full as it will stay, then some of the scenario's own kind.
Hit rates are of the counted requests: who found the adapter in device memory, in host memory, on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest.dialects import Dialect
from loadtest.options import Parser, base_folder, count, count_or_none, positive, result_file, result_folder
from loadtest.report import Figures
from loadtest.serve import Plan, measure
from loadtest.server_process import RunningServer, running_server
from loadtest.table import number, rows_table
from loadtest.workload import WorkloadSpec, draw
from server.errors import ConfigError

if TYPE_CHECKING:
    from adapters_store.manifest import BaseManifest

RANKS = (4, 5, 6, 7, 8)  # of the adapters, in turn
GOAL = 1.25  # p90 time to first token, all registered over few
PARTS = ("catalog", "mixes")
_TIERS = ("disk", "host", "device")
_COMPILE_CLIENTS = 4
_WARMUP_TOKENS = 4  # of an answer that isn't counted
_MAX_ID = 30_000  # of random prompts, where the base has as many
_RECORD = "made-for.json"  # in --folder: whose adapters lie there


@dataclass(frozen=True)
class Scenario:
    """Who is asked for, on a server with the first `registered` adapters."""

    name: str
    registered: int
    popularity: str
    base_share: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Where everything is, and the options."""

    model: Path
    folder: Path
    names: list[str]  # of all adapters
    first: Path  # folder of those that every server has
    rest: Path
    options: argparse.Namespace

    @contextmanager
    def server(self, registered: int) -> Iterator[RunningServer]:
        """One with the first adapters or all; one at a time, over one cache of compiled images."""
        more = ("--adapters", str(self.rest)) if registered > self.options.registered[0] else ()
        flags = ("--disable-access-log", *more, *self.options.flags.split())
        log = self.folder / "server.log"
        with running_server(self.model, self.first, self.folder / "cache", *flags, log=log) as server:
            yield server

    def ask(self, server: RunningServer, spec: WorkloadSpec, names: Sequence[str], console: Console) -> Figures:
        """Run it. Errors: RuntimeError if a request failed: what is left would be an easier workload."""
        spec = dataclasses.replace(spec, num_adapters=len(names))
        result = measure(Plan(server.url, Dialect("openai", "base", names), spec, num_warmups=0), console)
        if result["failed"]:
            raise RuntimeError(f"{result['failed']} of {spec.num_requests} requests failed: {result['error_counts']}")
        return result


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked, 1 where a server or a request failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.registered[0] >= options.registered[1]:
        parser.error("--registered takes two numbers, the smaller first")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as made:
        try:
            bench = _prepare(options, (options.folder or Path(made)).resolve(), console)
            results = _run(bench, console)
        except (ConfigError, ValueError) as error:
            parser.error(str(error))
        except RuntimeError as error:
            parser.exit(1, f"multilora bench catalog: {error}\n")
    console.print(_table(results["scenarios"]))
    for label, value in results["summary"].items():
        console.print(f"{label}: {number(value)}", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def scenarios_of(options: argparse.Namespace) -> list[Scenario]:
    """Those of the chosen parts."""
    few, law = options.registered[0], options.popularity
    mixes = [
        Scenario("base only", few, law, base_share=1.0),
        Scenario("one adapter has 90 %", few, "shares:0.9,*=0.1"),
        Scenario("90 % base", few, law, base_share=0.9),
    ]
    catalog = [Scenario(f"{count:,} registered", count, law) for count in options.registered]
    return [*(catalog if "catalog" in options.parts else []), *(mixes if "mixes" in options.parts else [])]


def check(options: argparse.Namespace, model: Path, names: Sequence[str]) -> None:
    """All that can be known before adapters are written; `highest_id` is set by the vocabulary where it isn't given.

    Errors: ConfigError or ValueError that says what can't be asked.
    """
    from server.model.skeleton import read_config

    config = read_config(model).get_text_config()
    options.highest_id = options.highest_id or min(_MAX_ID, config.vocab_size)
    if options.highest_id > config.vocab_size:
        raise ValueError(f"--highest-id {options.highest_id}: {model} has {config.vocab_size} token ids")
    limit = getattr(config, "max_position_embeddings", None)  # without one, --flags have it
    if limit and options.prompt_tokens + options.output_tokens > limit:
        raise ValueError(
            f"--prompt-tokens {options.prompt_tokens} and --output-tokens {options.output_tokens} are together more "
            f"than the {limit} tokens of a request to {model}"
        )
    for scenario in scenarios_of(options):
        found = names[: scenario.registered]
        spec = dataclasses.replace(_spec(options, scenario, options.rate or 1.0, turn=0), num_adapters=len(found))
        try:
            draw(spec, found)
        except ValueError as error:
            raise ValueError(f"{scenario.name!r} with --registered {scenario.registered}: {error}") from None


def claim(folder: Path, manifest: BaseManifest) -> None:
    """Note whose adapters lie in `folder`. Errors: ValueError where they are for another base or of other ranks."""
    mine = {"base": manifest.name_or_path, "digest": manifest.digest, "ranks": list(RANKS)}
    record = folder / _RECORD
    if not record.exists():
        if any(folder.glob("first-*")):
            raise ValueError(f"--folder {folder}: adapters of an unknown base are there, without a {_RECORD}")
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(mine) + "\n")
    found = json.loads(record.read_text())
    if any(found[key] != mine[key] for key in ("digest", "ranks")):
        theirs, ours = (f"{of['base']} ({of['digest'][:12]}), ranks {of['ranks']}" for of in (found, mine))
        raise ValueError(f"--folder {folder}: its adapters are for {theirs}, not for {ours}")


def _prepare(options: argparse.Namespace, folder: Path, console: Console) -> Bench:
    """Write the adapters and have each compiled, where an earlier run in the same folder has not."""
    from server.config import default_cache_dir
    from server.demo import ensure_demo_base
    from server.model.manifest import build_manifest

    model = options.model or ensure_demo_base(default_cache_dir())
    few, many = options.registered
    names = [f"c{index:04d}" for index in range(many)]
    check(options, model, names)
    manifest = build_manifest(model, "auto", folder / "hashes")
    claim(folder, manifest)
    first, rest = folder / f"first-{few}", folder / f"rest-{few}-{many}"
    for path in (first, rest):
        path.mkdir(parents=True, exist_ok=True)
    paths = [(first if index < few else rest) / name for index, name in enumerate(names)]
    _write(manifest, [path for path in paths if not (path / "adapter_model.safetensors").exists()], console)
    bench = Bench(model, folder, names, first, rest, options)
    console.print(f"compiling {many} adapters")
    with bench.server(many) as server:
        bench.ask(server, _once_each(options, many), names, console)
    return bench


def _once_each(options: argparse.Namespace, num_adapters: int) -> WorkloadSpec:
    """A short request to each adapter."""
    return WorkloadSpec(
        num_requests=num_adapters,
        arrivals=f"closed:{_COMPILE_CLIENTS}",
        popularity="distinct",
        prompt_tokens="4",
        output_tokens="1",
        highest_id=options.highest_id,
    )


def _write(manifest: BaseManifest, paths: Sequence[Path], console: Console) -> None:
    from loadtest.adapters import write_random_adapter

    for path in track(paths, "writing adapters", console=console, transient=True):
        index = int(path.name[1:])
        write_random_adapter(path, manifest, RANKS[index % len(RANKS)], seed=index)


def _run(bench: Bench, console: Console) -> dict[str, Any]:
    options = bench.options
    rates = [] if options.rate else _capacity(bench, console)
    rate = options.rate or options.load * statistics.median(rates)
    console.print(f"{rate:.2f} requests/s for every scenario")
    scenarios = scenarios_of(options)
    runs: dict[str, list[Figures]] = {scenario.name: [] for scenario in scenarios}
    for turn in range(options.repeats):
        for scenario in scenarios[:: -1 if turn % 2 else 1]:
            result = run_scenario(bench, scenario, rate, turn, console)
            runs[scenario.name].append(result)
            console.print(f"  {turn + 1} {scenario.name}: p90 {number(result['p90_ttft_ms'])} ms", highlight=False)
            _keep(result, options.out, scenario, turn)
    capacity = {"capacity, requests/s": rates} if rates else {}
    return {
        **capacity,
        "rate, requests/s": rate,
        "scenarios": {name: medians(found) for name, found in runs.items()},
        "summary": summary(runs, scenarios),
    }


def _capacity(bench: Bench, console: Console) -> list[float]:
    """The base's requests a second in a closed loop, run by run."""
    options, few = bench.options, bench.options.registered[0]
    spec = WorkloadSpec(
        num_requests=2 * options.concurrency,
        arrivals=f"closed:{options.concurrency}",
        base_share=1.0,
        prompt_tokens=str(options.prompt_tokens),
        output_tokens=str(options.output_tokens),
        highest_id=options.highest_id,
    )
    with bench.server(few) as server:
        bench.ask(server, dataclasses.replace(spec, output_tokens=str(_WARMUP_TOKENS)), [], console)
        found = []
        for turn in range(options.repeats):
            result: Any = bench.ask(server, dataclasses.replace(spec, seed=1 + turn), [], console)
            found.append(result["request_throughput"])
            console.print(f"capacity: {found[-1]:.2f} requests/s, {result['output_throughput']:.0f} tokens/s")
    return found


def run_scenario(bench: Bench, scenario: Scenario, rate: float, turn: int, console: Console) -> Figures:
    """Figures of one run, with `tiers` of the counted requests."""
    names, spec = bench.names[: scenario.registered], _spec(bench.options, scenario, rate, turn)
    warmup = dataclasses.replace(
        spec,
        seed=spec.seed + (1 << 40),
        num_requests=bench.options.warmup,
        arrivals="closed:8",
        output_tokens=str(_WARMUP_TOKENS),
    )
    with bench.server(scenario.registered) as server:
        bench.ask(server, _once_each(bench.options, len(names)), names, console)
        if warmup.num_requests:
            bench.ask(server, warmup, names, console)
        before = read_counters(server.url)
        result = bench.ask(server, spec, names, console)
        tiers = tier_figures(before, read_counters(server.url))
    return {**result, "label": scenario.name, "tiers": tiers}


def _spec(options: argparse.Namespace, scenario: Scenario, rate: float, turn: int) -> WorkloadSpec:
    return WorkloadSpec(
        seed=1000 + turn,
        num_requests=options.num_requests,
        arrivals=f"poisson:{rate:g}",
        popularity=scenario.popularity,
        base_share=scenario.base_share,
        prompt_tokens=str(options.prompt_tokens),
        output_tokens=str(options.output_tokens),
        highest_id=options.highest_id,
    )


def read_counters(url: str) -> dict[str, float]:
    """What GET /metrics says of the adapters; a tier's value is under `name:tier`."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return {
        ":".join(filter(None, (sample.name, sample.labels.get("tier", "")))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(("multilora_adapter_", "multilora_tier_")) and "phase" not in sample.labels
    }


def tier_figures(before: dict[str, float], after: dict[str, float]) -> Figures:
    """Where adapters were found between two scrapes (shares of the acquires), and what the tiers hold."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    acquires, loads = grown("multilora_adapter_acquires_total"), grown("multilora_adapter_loads_total")
    from_host = grown("multilora_adapter_host_hits_total")
    hits = {"device": acquires - loads, "host": from_host, "disk": loads - from_host}
    return {
        "acquires": acquires,
        **{f"hit_share_{tier}": count / acquires if acquires else None for tier, count in hits.items()},
        "compiles": grown("multilora_adapter_compiles_total"),
        **{f"evictions_{tier}": grown(f"multilora_tier_evictions_total:{tier}") for tier in _TIERS},
        **{f"adapters_{tier}": after[f"multilora_tier_adapters:{tier}"] for tier in _TIERS},
        "device_bytes": after["multilora_tier_bytes:device"],
        "device_capacity_bytes": after["multilora_adapter_capacity_bytes"],
    }


_SHOWN = {
    "p50_ttft_ms": "time to first token p50, ms",
    "p90_ttft_ms": "p90",
    "p99_ttft_ms": "p99",
    "p50_tpot_ms": "time per token p50, ms",
    "p50_itl_ms": "gap between tokens p50, ms",
    "p99_itl_ms": "p99 gap",
    "output_throughput": "output tokens/s",
    "hit_share_device": "found on the device",
    "hit_share_host": "found in host memory",
    "hit_share_disk": "read from disk",
    "evictions_device": "evictions from the device",
    "compiles": "compiles",
    "adapters_device": "adapters on the device at the end",
    "device_capacity_bytes": "room on the device, bytes",
    "p99_send_lag_ms": "sent late p99, ms",
}


def medians(runs: Sequence[Figures]) -> dict[str, float | None]:
    """Of each figure that is shown, over the runs that have it."""
    found: dict[str, float | None] = {}
    for key in _SHOWN:
        tables: list[Any] = [{**run, **run["tiers"]} for run in runs]  # type: ignore[dict-item]
        values = [table[key] for table in tables if table[key] is not None]
        found[key] = statistics.median(values) if values else None
    return found


def summary(runs: dict[str, list[Figures]], scenarios: Sequence[Scenario]) -> dict[str, object]:
    """Ratios of the same round: the larger catalog over the smaller, and each mix over the base alone."""
    lines: dict[str, object] = {}
    by_size = [s.name for s in sorted(scenarios, key=lambda s: s.registered) if s.name.endswith("registered")]
    pairs = [(by_size[-1], by_size[0])] if by_size else []
    pairs += [(s.name, "base only") for s in scenarios if "base only" in runs and s.name not in (*by_size, "base only")]
    for top, bottom in pairs:
        for key in ("p50_ttft_ms", "p90_ttft_ms", "output_throughput"):
            ratios: list[Any] = [a[key] / b[key] for a, b in zip(runs[top], runs[bottom], strict=True)]  # type: ignore[operator]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            goal = f", goal {GOAL}" if key == "p90_ttft_ms" and top in by_size else ""
            lines[f"{key}, {top} over {bottom} ({shown}{goal})"] = statistics.median(ratios)
    return lines


def _keep(result: Figures, out: Path | None, scenario: Scenario, turn: int) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = scenario.name.replace(" ", "-").replace(",", "").replace("%", "percent")
        (out / f"{name}-{turn + 1}.json").write_text(json.dumps(result) + "\n")


def _table(scenarios: Mapping[str, Mapping[str, float | None]]) -> Table:
    """One column a scenario."""
    return rows_table("medians", {label: {n: f[key] for n, f in scenarios.items()} for key, label in _SHOWN.items()})


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="multilora bench catalog", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=base_folder, help="a local base; default the demo base")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--registered", nargs=2, type=count, default=[32, 1000], help="adapters of the two servers")
    parser.add_argument("--num-requests", type=count, default=200, help="of each run")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--load", type=positive, default=0.7, help="arrivals, as a share of the base's capacity")
    parser.add_argument("--rate", type=positive, help="requests/s; the capacity is not measured then")
    parser.add_argument("--concurrency", type=count, default=32, help="of the capacity's closed loop")
    parser.add_argument("--popularity", default="power:0.3")
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--output-tokens", type=count, default=64)
    parser.add_argument("--highest-id", type=count, help="of random prompts, not included; by the base's vocabulary")
    warmup = "requests of the same kind before each run, not counted; 0: none"
    parser.add_argument("--warmup", type=count_or_none, default=64, help=warmup)
    parser.add_argument("--folder", type=result_folder, help="keeps adapters and images for a later run")
    parser.add_argument("--flags", default="", help="more of the servers' command line, in one string")
    parser.add_argument("--out", type=result_folder, help="folder for the result of every run")
    parser.add_argument("--json", type=result_file, help="write the figures here too")
    return parser
