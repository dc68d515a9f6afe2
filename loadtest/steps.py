"""A decode step in process: what adapters add to it, where its time goes, and what is not the model's.

Pairs of forward passes over the same rows, with the adapters and without, so that the machine's drift falls on both.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.bandwidth import read_bandwidth

if TYPE_CHECKING:
    from loadtest.bench import Workload
    from server.engine.batch import Batch
    from server.offline import LLM

RANKS = (8, 16, 32, 64)  # of the adapters, in turn
NUM_PAIRS = 200
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
    batch, host_s = _decoding(llm, workload, names)
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
        "a step outside the forward pass, ms": host_s * 1e3,
        "that, of a whole step without adapters": host_s / (host_s + base_s),
        "read bandwidth in this run, GB/s": bandwidth / 1e9,
        **pairs.parts(),
    }


def _write_adapters(llm: LLM, folder: Path, workload: Workload) -> list[str]:
    from loadtest.adapters import write_random_adapter

    names = [f"bench-{index:03d}" for index in range(workload.num_adapters)]
    for index, name in enumerate(names):
        write_random_adapter(folder / name, llm.manifest, RANKS[index % len(RANKS)], seed=index)
    return names


def _decoding(llm: LLM, workload: Workload, adapters: list[str]) -> tuple[Batch, float]:
    """A batch in which every request decodes, and the median time of its kind of step outside the forward pass."""
    from server.engine.messages import SamplingParams

    params = SamplingParams(max_tokens=workload.prompt_tokens, temperature=0.0, ignore_eos=True)
    core: Any = llm.core
    forward = Timed(core._runner._forward)
    core._runner._forward = forward
    batches = Kept(core._batches)
    core._batches = batches
    for index, adapter in enumerate(adapters):
        prompt = [3 + (7 * index + 11 * position) % 4000 for position in range(workload.prompt_tokens)]
        llm.submit(prompt, adapter, params)
    outside: list[float] = []
    deadline = time.monotonic() + 600
    while len(outside) < 30:
        assert time.monotonic() < deadline, "the requests never all decode at once"
        started = time.perf_counter()
        outputs = core.step()
        elapsed = time.perf_counter() - started
        if outputs.stats.rows == len(adapters) == len(outputs.outputs):
            outside.append(elapsed - forward.last_s)
    core._runner._forward = forward.forward
    return batches.last, statistics.median(outside)


class Timed:
    """A forward pass that remembers how long it took."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.largest = forward.largest
        self.last_s = 0.0

    def __call__(self, inputs: Any) -> Any:
        started = time.perf_counter()
        logits = self.forward(inputs)
        self.last_s = time.perf_counter() - started
        return logits


class Kept:
    """A batch builder that remembers its last batch."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.last: Any = None

    def build(self, plan: Any) -> Any:
        self.last = self._builder.build(plan)
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
        self._spent: dict[str, list[Any]] = {"without": [], "with": []}
        self.with_adapters: list[float] = []
        self.without: list[float] = []

    def sample(self) -> None:
        """One of each."""
        self.without.append(self._time(None, None, "without"))
        self.with_adapters.append(self._time(*self._segments, "with"))

    def parts(self) -> dict[str, object]:
        """Median milliseconds of each part of the native pass, with adapters and without."""
        if self._decoder is None:
            return {}
        from kernels.cpu.forward import PARTS

        columns = {kind: [*zip(*spent, strict=True)] for kind, spent in self._spent.items()}
        return {
            f"{part}, ms without / with": " / ".join(
                f"{statistics.median(columns[kind][number]) / 1e6:.2f}" for kind in ("without", "with")
            )
            for number, part in enumerate(PARTS)
        }

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
