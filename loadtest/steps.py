"""A decode step in process: what adapters add to it, and where its time goes.

Pairs of forward passes over the same rows, with the adapters and without, so that the machine's drift falls on both.
What a step does beside its forward pass is timed in whole steps: of requests to the base, then of requests to adapters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.bandwidth import read_bandwidth

if TYPE_CHECKING:
    from loadtest.bench import Workload
    from server.engine.batch import Batch
    from server.offline import LLM

RANKS = (8, 16, 32, 64)  # of the adapters, in turn
NUM_PAIRS = 200
NUM_STEPS = 30  # whole ones
KINDS = ("without", "with")  # adapters
SHARES = {  # of a step's table; the native pass's parts in each
    "GEMM": ("GEMM",),
    "attention": ("attention",),
    "adapters": ("adapters",),
    "head and sampling": ("head",),
    "small ops": ("embedding", "small ops"),
}
_READ_BYTES = 2 << 30


def measure_steps(workload: Workload, folder: Path) -> dict[str, object]:
    """Medians over NUM_PAIRS decode steps of `num_adapters` rows, one adapter each, and the byte floors."""
    from server.config import EngineConfig
    from server.offline import LLM

    count = workload.num_adapters
    config = EngineConfig(
        model=str(workload.model), cache_dir=str(folder / "cache"), max_num_seqs=count, enable_prefix_cache=False
    )
    (folder / "adapters").mkdir()
    llm = LLM(config, adapters=folder / "adapters")
    names = _write_adapters(llm, folder / "adapters", workload)
    adapter_bytes = sum(llm.adapter(name).data_bytes for name in names)
    _, base_outside = _decoding(llm, workload, [None] * count)
    batch, outside = _decoding(llm, workload, names)
    pairs = Pairs(llm, batch)
    for _ in range(NUM_PAIRS):
        pairs.sample()
    bandwidth = read_bandwidth(_READ_BYTES)
    base_s, full_s = statistics.median(pairs.without), statistics.median(pairs.with_adapters)
    added_s = statistics.median(b - a for a, b in zip(pairs.without, pairs.with_adapters, strict=True))
    weights = llm.core.ready.weights_bytes
    llm.close()
    return {
        "rows (one adapter each)": count,
        "forward pass without adapters, ms": base_s * 1e3,
        "its byte floor (the weights once), ms": weights / bandwidth * 1e3,
        "share of the floor": weights / bandwidth / base_s,
        "forward pass with adapters, ms": full_s * 1e3,
        "adapters' own cost (median of pairs), ms": added_s * 1e3,
        "adapter bytes in a step, MB": adapter_bytes / 1e6,
        "adapters' byte floor, ms": adapter_bytes / bandwidth * 1e3,
        "adapters' cost over their floor": added_s / (adapter_bytes / bandwidth),
        "step with adapters over the floor of both": full_s / ((weights + adapter_bytes) / bandwidth),
        "read bandwidth in this run, GB/s": bandwidth / 1e9,
        "where a step's time goes": step_table(
            {
                "without": column(base_s, base_outside, pairs.parts("without")),
                "with": column(full_s, outside, pairs.parts("with")),
            }
        ),
    }


def _write_adapters(llm: LLM, folder: Path, workload: Workload) -> list[str]:
    from loadtest.adapters import write_random_adapter

    names = [f"bench-{index:03d}" for index in range(workload.num_adapters)]
    for index, name in enumerate(names):
        write_random_adapter(folder / name, llm.manifest, RANKS[index % len(RANKS)], seed=index)
    return names


@dataclass(frozen=True)
class Outside:
    """What a step does beside its forward pass; medians over whole steps."""

    all_s: float  # sampling included
    sampling_s: float


def column(forward_s: float, outside: Outside, parts: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of a step by SHARES, the rest as the host's. `parts`: the native pass's, none where modules run."""
    shares = {name: sum(parts[part] for part in of) * 1e3 for name, of in SHARES.items()} if parts else {}
    if not parts:
        shares = {"forward pass": forward_s * 1e3, "head and sampling": 0.0}
    shares["head and sampling"] += outside.sampling_s * 1e3
    whole = (forward_s + outside.all_s) * 1e3
    return {**shares, "host": whole - sum(shares.values()), "whole step": whole}


def step_table(columns: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Rows by part: of each column its milliseconds and its share of the whole."""
    names = next(iter(columns.values()))
    return {
        name: {
            label: value
            for kind, values in columns.items()
            for label, value in (
                (f"{kind} adapters, ms", values[name]),
                (f"{kind}, share", values[name] / values["whole step"]),
            )
        }
        for name in names
    }


def _decoding(llm: LLM, workload: Workload, adapters: Sequence[str | None]) -> tuple[Batch, Outside]:
    """A batch in which every request decodes, and what its kind of step does outside the forward pass."""
    from server.engine.messages import SamplingParams

    params = SamplingParams(max_tokens=workload.prompt_tokens, temperature=0.0, ignore_eos=True)
    core: Any = llm.core
    runner: Any = core._runner
    forward, sample, batches = Timed(runner._forward), Timed(runner._sampler.sample), Kept(core._batches)
    runner._forward, runner._sampler.sample, core._batches = forward, sample, batches
    ids = []
    for index, adapter in enumerate(adapters):
        ids.append(llm.submit(workload.prompt(7 * index), adapter, params))
    found: list[tuple[float, float]] = []
    deadline = time.monotonic() + 600
    while len(found) < NUM_STEPS:
        assert time.monotonic() < deadline, "the requests never all decode at once"
        started = time.perf_counter()
        outputs = core.step()
        elapsed = time.perf_counter() - started
        if outputs.stats.rows == len(adapters) == len(outputs.outputs):
            found.append((elapsed - forward.last_s, sample.last_s))
    runner._forward, runner._sampler.sample, core._batches = forward.call, sample.call, batches.builder
    if not any(adapters):
        core.abort(ids)  # those with adapters keep theirs on the device, for the pairs
    return batches.last, Outside(*(statistics.median(times) for times in zip(*found, strict=True)))


class Timed:
    """A call that remembers how long it took."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.last_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = self.call(*arguments)
        self.last_s = time.perf_counter() - started
        return result


class Kept:
    """A batch builder that remembers its last batch."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.last: Any = None

    def build(self, plan: Any) -> Any:
        self.last = self.builder.build(plan)
        return self.last


class Pairs:
    """The forward pass of one batch, with its adapters and without, in turn."""

    def __init__(self, llm: LLM, batch: Batch) -> None:
        runner: Any = llm.core._runner
        runner.logits(batch)  # fills the step's state, which the calls below use as it is
        self._step = runner._step
        self._forward = runner._forward
        self._inputs = runner._inputs.fill(batch)
        self._segments = self._step.segments, self._step.head_segments
        self._decoder: Any = getattr(self._forward, "_decoder", None)
        self._spent: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
        self.with_adapters: list[float] = []
        self.without: list[float] = []

    def sample(self) -> None:
        """One of each."""
        self.without.append(self._time(None, None, "without"))
        self.with_adapters.append(self._time(*self._segments, "with"))

    def parts(self, kind: str) -> dict[str, float]:
        """Median seconds of each part of the native pass, for one of KINDS; none where the modules run."""
        from kernels.cpu.forward import PARTS

        columns = zip(*self._spent[kind], strict=True)
        return {part: statistics.median(times) / 1e9 for part, times in zip(PARTS, columns, strict=False)}

    def _time(self, body: Any, head: Any, kind: str) -> float:
        import torch

        self._step.segments, self._step.head_segments = body, head
        spent = self._decoder.profile() if self._decoder is not None else None
        started = time.perf_counter()
        with torch.inference_mode():
            self._forward(self._inputs)
        elapsed = time.perf_counter() - started
        if spent is not None:
            self._spent[kind].append(spent.tolist())
        return elapsed
