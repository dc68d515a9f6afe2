"""`multilora bench thrash`: twice as many hot adapters as fit the arena, against an arena that holds them all.

    multilora bench thrash --repeats 3 --json thrash.json

The engine alone, in this process. Adapters are asked for alike, by Poisson arrivals at a share of the fitting arena's
capacity (a closed loop measures it first); all kinds of a round have the same arrivals and prompts, and go in turns,
every other round backwards. Time to first token is from the scheduled arrival. Kinds:

    real           loads cost what they cost here: read from disk (or --host-memory), verified, copied
    GPU, N MB      besides, a load takes at least as long relative to a step as on a GPU server,

        N MB / --gpu-gb-per-s / --gpu-step-ms  steps

    so 80 MB (rank 16 on all linears of an 8B base) over PCIe at 25 GB/s are 3.2 ms, a third of a step of 10 ms; 336 MB
    (rank 64) are 1.3 steps. The loader is held to  image bytes / (that many of our own decode steps) , the step being
    the median of the capacity's run. One load after the other, as on one copy engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.console import Console

from loadtest.arrivals import parse_arrivals
from loadtest.options import Parser, base_folder, count, count_or_none, lora_rank, positive, result_file, result_folder
from loadtest.table import number, rows_table
from server.errors import ConfigError

if TYPE_CHECKING:
    from adapters_store.ref import AdapterRef
    from server.adapters.slots import SlotDevice
    from server.config import EngineConfig
    from server.engine.core import EngineCore
    from server.engine.messages import AddRequest, StepOutputs

Figures = dict[str, float]
REAL_GOAL, GPU_GOAL = 1.3, 3.0  # median time to first token, thrashing over fitting
FITTING, THRASHING = "fitting", "thrashing"
_MAX_ID = 30_000  # of random prompts, where the base has as many
_KV_BYTES = 1 << 30  # room for all requests, so that it is the arena that lacks
_IDLE_S = 0.0005  # between two looks at an engine that has nothing to do yet


class ThrottledDevice:
    """A SlotDevice whose loads take at least their bytes over `bytes_per_s`, one after the other."""

    def __init__(self, device: SlotDevice, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_s = 0.0  # when the load before is through
        self.commit, self.clear, self.move = device.commit, device.clear, device.move
        self.check_table = device.check_table

    def load(self, ref: AdapterRef, slot: int, offset_bytes: int) -> Future[None]:
        """As the device's own, and done not before its time."""
        self._free_s = max(self._free_s, self._clock()) + ref.data_bytes / self._bytes_per_s
        return _LateFuture(self._device.load(ref, slot, offset_bytes), self._free_s, self._clock)


class _LateFuture(Future[None]):
    """Another future that isn't done before `due_s`, for who polls it."""

    def __init__(self, inner: Future[None], due_s: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self._inner = inner
        self._due_s = due_s
        self._clock = clock

    def done(self) -> bool:
        return self._inner.done() and self._clock() >= self._due_s

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._inner.exception(timeout)


@dataclass(frozen=True)
class Kind:
    """How fast loads are: `steps` of our own a load at least takes; None: as they are."""

    name: str
    goal: float
    steps: float | None = None


def kinds_of(options: argparse.Namespace) -> list[Kind]:
    """The real one, and one for each size of an image on a GPU."""
    gpu = [
        Kind(f"GPU, {megabytes:g} MB", GPU_GOAL, steps_of_load(megabytes, options.gpu_gb_per_s, options.gpu_step_ms))
        for megabytes in options.gpu_mb
    ]
    return [*([] if options.no_real else [Kind("real", REAL_GOAL)]), *gpu]


def steps_of_load(megabytes: float, gb_per_s: float, step_ms: float) -> float:
    """How many steps a copy to the device takes."""
    return megabytes / gb_per_s / step_ms  # MB over GB/s are ms


@dataclass
class Run:
    """What happened to the requests of one run, on `clock`."""

    first_s: dict[str, float] = field(default_factory=dict)  # of the first token, by request id
    ended_s: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)  # of steps that only decode
    running: list[int] = field(default_factory=list)  # requests, by step
    adapters: list[int] = field(default_factory=list)  # distinct ones, by step
    num_tokens: int = 0

    def take(self, step: StepOutputs, now: float) -> None:
        """Account for what a step gave."""
        if step.outputs:
            self.running.append(step.stats.num_running)
            self.adapters.append(step.stats.distinct_adapters)
            if step.stats.rows == len(step.outputs) and all(o.num_cached_tokens is None for o in step.outputs):
                self.steps_s.append(step.stats.step_s)
        for output in step.outputs:
            self.num_tokens += len(output.token_ids)
            if output.token_ids:
                self.first_s.setdefault(output.request_id, now)
            if output.error is not None:
                self.errors.append(output.error.message)
            if output.finish_reason is not None:
                self.ended_s[output.request_id] = now


def drive(core: EngineCore, requests: Sequence[AddRequest], at_s: Sequence[float], most: int | None = None) -> Run:
    """Add each request at its time (seconds from now), at most `most` at once, and step until all have ended."""
    run, waiting = Run(), deque(zip(at_s, requests, strict=True))
    start = time.monotonic()
    num_added = 0
    while len(run.ended_s) < len(requests):
        now = time.monotonic() - start
        while waiting and waiting[0][0] <= now and (most is None or num_added - len(run.ended_s) < most):
            core.add(waiting.popleft()[1])
            num_added += 1
        outputs = core.step()
        run.take(outputs, time.monotonic() - start)
        if not outputs.outputs:
            time.sleep(_IDLE_S)
    return run


def figures_of(run: Run, at_s: Mapping[str, float], core: EngineCore) -> Figures:
    """Times in ms. Errors: RuntimeError where a request failed: what is left would be an easier workload."""
    if run.errors:
        raise RuntimeError(f"{len(run.errors)} of {len(at_s)} requests failed: {run.errors[0]}")
    ttft = [(run.first_s[request_id] - at) * 1e3 for request_id, at in at_s.items()]
    p50, p90, p99 = (float(value) for value in np.percentile(ttft, (50, 90, 99)))
    return {
        "time to first token p50, ms": p50,
        "p90": p90,
        "p99": p99,
        "output tokens/s": run.num_tokens / max(run.ended_s.values()),
        "loads": float(core.slots.loads),
        "evictions": float(core.slots.evictions),
        "preemptions": float(core.scheduler.num_preemptions),
        "requests running, mean": statistics.fmean(run.running),
        "distinct adapters in a step, mean": statistics.fmean(run.adapters),
        "decode step, ms": statistics.median(run.steps_s) * 1e3 if run.steps_s else 0.0,
    }


class Bench:
    """The compiled adapters, and engines over arenas of either size."""

    def __init__(self, options: argparse.Namespace, model: Path, folder: Path, console: Console) -> None:
        from server.config import EngineConfig

        self.options = options
        self._config = EngineConfig(
            model=str(model),
            cache_dir=str(folder / "cache"),
            kv_memory=_KV_BYTES,
            enable_prefix_cache=False,
            host_memory=options.host_memory,
            max_queue_wait_s=600.0,
        )
        self.refs, self.vocab_size = _compile(self._config, options, folder / "adapters")
        sizes = sorted({ref.data_bytes for ref in self.refs})
        console.print(f"{len(self.refs)} adapters of {sizes[-1] / 1e6:.1f} MB, {options.fit} fit the smaller arena")

    def engine(self, size: str, bytes_per_s: float | None) -> EngineCore:
        """One with an empty arena for all adapters, or for those that fit."""
        from server.adapters.regions import region_bytes
        from server.engine.build import build

        number_of = self.options.fit if size == THRASHING else len(self.refs)
        nbytes = number_of * max(region_bytes(ref.data_bytes) for ref in self.refs)
        config: EngineConfig = msgspec.structs.replace(self._config, adapter_memory=nbytes)
        if bytes_per_s is None:
            return build(config)
        return build(config, device_of=lambda arena: ThrottledDevice(arena, bytes_per_s))

    def requests(self, count: int, seed: int, output_tokens: int | None = None) -> list[AddRequest]:
        """Random prompts, each for an adapter drawn alike."""
        from server.engine.messages import AddRequest, SamplingParams

        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(self.refs), size=count)
        highest = min(_MAX_ID, self.vocab_size)
        params = SamplingParams(
            max_tokens=output_tokens or self.options.output_tokens, temperature=0.0, ignore_eos=True
        )
        return [
            AddRequest(
                request_id=f"{seed}-{index}",
                prompt_ids=rng.integers(3, highest, size=self.options.prompt_tokens).tolist(),
                params=params,
                adapter=self.refs[adapter],
            )
            for index, adapter in enumerate(drawn)
        ]

    def capacity(self) -> tuple[float, float]:
        """(requests/s, seconds of a decode step) of a closed loop over the fitting arena."""
        core = self.engine(FITTING, None)
        most = self.options.concurrency
        self._warm(core)
        run = drive(core, self.requests(2 * most, seed=1), [0.0] * 2 * most, most)
        core.close()
        if run.errors:
            raise RuntimeError(f"{len(run.errors)} requests of the capacity's run failed: {run.errors[0]}")
        return len(run.ended_s) / max(run.ended_s.values()), statistics.median(run.steps_s)

    def measure(self, size: str, bytes_per_s: float | None, rate: float, seed: int) -> Figures:
        """One run on an engine of its own, warmed by requests that aren't counted."""
        core = self.engine(size, bytes_per_s)
        self._warm(core)
        before = core.slots.loads, core.slots.evictions, core.scheduler.num_preemptions
        requests = self.requests(self.options.num_requests, seed)
        times = parse_arrivals(f"poisson:{rate:g}").times(len(requests), np.random.default_rng(seed)).tolist()
        run = drive(core, requests, times)
        found = figures_of(run, {r.request_id: at for r, at in zip(requests, times, strict=True)}, core)
        core.check_integrity()
        core.close()
        for key, value in zip(("loads", "evictions", "preemptions"), before, strict=True):
            found[key] -= value
        return found

    def _warm(self, core: EngineCore) -> None:
        """Each adapter once, so that who fits is there."""
        requests = self.requests(len(self.refs), seed=2, output_tokens=2)
        each = [msgspec.structs.replace(request, adapter=ref) for request, ref in zip(requests, self.refs, strict=True)]
        drive(core, each, [0.0] * len(each), 8)


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked, 1 where a request failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as made:
        try:
            results = run_bench(options, (options.folder or Path(made)).resolve(), console)
        except (ConfigError, ValueError) as error:
            parser.error(str(error))
        except RuntimeError as error:
            parser.exit(1, f"multilora bench thrash: {error}\n")
    for kind, columns in results["kinds"].items():
        labels = next(iter(columns.values()))
        console.print(rows_table(kind, {key: {size: of[key] for size, of in columns.items()} for key in labels}))
    for label, value in results["summary"].items():
        console.print(f"{label}: {number(value)}", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def run_bench(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """All rounds; medians of each kind and ratios of each round."""
    from server.config import default_cache_dir
    from server.demo import ensure_demo_base

    bench = Bench(options, options.model or ensure_demo_base(default_cache_dir()), folder, console)
    capacity, step_s = bench.capacity()
    rate = options.load * capacity
    console.print(f"capacity {capacity:.2f} requests/s; {rate:.2f} for every kind; a decode step {step_s * 1e3:.1f} ms")
    kinds = kinds_of(options)
    runs: dict[str, dict[str, list[Figures]]] = {kind.name: {FITTING: [], THRASHING: []} for kind in kinds}
    for turn in range(options.repeats):
        for kind, size in _order(kinds, turn):
            throttle = kind.steps and max(ref.data_bytes for ref in bench.refs) / (kind.steps * step_s)
            found = bench.measure(size, throttle, rate, seed=1000 + turn)
            runs[kind.name][size].append(found)
            console.print(
                f"  {turn + 1} {kind.name}, {size}: p50 {number(found['time to first token p50, ms'])} ms, "
                f"{found['loads']:.0f} loads",
                highlight=False,
            )
    return {
        "capacity, requests/s": capacity,
        "rate, requests/s": rate,
        "decode step, ms": step_s * 1e3,
        "steps of a load": {kind.name: kind.steps for kind in kinds},
        "kinds": {name: {size: _medians(found) for size, found in of.items()} for name, of in runs.items()},
        "summary": summary(runs, kinds),
    }


def summary(runs: Mapping[str, Mapping[str, Sequence[Figures]]], kinds: Iterable[Kind]) -> dict[str, float]:
    """Medians over the rounds of thrashing over fitting, by kind."""
    lines: dict[str, float] = {}
    for kind in kinds:
        pairs = list(zip(runs[kind.name][THRASHING], runs[kind.name][FITTING], strict=True))
        for key in ("time to first token p50, ms", "p90", "p99", "output tokens/s"):
            ratios = [thrashing[key] / fitting[key] for thrashing, fitting in pairs]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            goal = f", goal {kind.goal:g}" if key.startswith("time") else ""
            lines[f"{kind.name}: {key}, thrashing over fitting ({shown}{goal})"] = statistics.median(ratios)
    return lines


def _order(kinds: Sequence[Kind], turn: int) -> Iterator[tuple[Kind, str]]:
    pairs = [(kind, size) for kind in kinds for size in (FITTING, THRASHING)]
    yield from pairs[:: -1 if turn % 2 else 1]


def _medians(runs: Sequence[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _compile(config: EngineConfig, options: argparse.Namespace, folder: Path) -> tuple[list[AdapterRef], int]:
    """The images of 2 x `fit` random adapters, on disk; and the base's vocabulary size."""
    from loadtest.adapters import write_random_adapter
    from server.offline import LLM

    llm = LLM(config, adapters=folder)
    try:
        names = [f"t{index:03d}" for index in range(2 * options.fit)]
        for index, name in enumerate(names):
            if not (folder / name).exists():
                write_random_adapter(folder / name, llm.manifest, options.rank, seed=index)
        return [llm.adapter(name) for name in names], llm.core.ready.vocab_size
    finally:
        llm.close()


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="multilora bench thrash", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=base_folder, help="a local base; default the demo base")
    parser.add_argument(
        "--fit", type=count, default=16, help="adapters that the smaller arena holds; twice as many ask"
    )
    parser.add_argument("--rank", type=lora_rank, default=16)
    parser.add_argument("--num-requests", type=count, default=200, help="of each run")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--load", type=positive, default=0.6, help="arrivals, as a share of the capacity")
    parser.add_argument("--concurrency", type=count, default=32, help="of the capacity's closed loop")
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--output-tokens", type=count, default=64)
    parser.add_argument("--host-memory", type=count_or_none, default=0, help="bytes of the host tier; 0: none")
    parser.add_argument("--gpu-mb", type=positive, nargs="*", default=[80.0, 336.0], help="images on the GPU server")
    parser.add_argument("--gpu-gb-per-s", type=positive, default=25.0, help="its copies to the device")
    parser.add_argument("--gpu-step-ms", type=positive, default=10.0, help="its decode step")
    parser.add_argument("--no-real", action="store_true", help="only the throttled kinds")
    parser.add_argument("--folder", type=result_folder, help="keeps adapters and images for a later run")
    parser.add_argument("--json", type=result_file, help="write the figures here too")
    return parser
