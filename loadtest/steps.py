"""What adapters add to a decode step, in process: steps with and without them in turn."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.bandwidth import read_bandwidth

if TYPE_CHECKING:
    from loadtest.bench import Workload
    from server.offline import LLM


def measure_steps(workload: Workload, folder: Path) -> dict[str, object]:
    """Median decode step with one adapter a row and without, and the difference over the adapters' byte floor."""
    from loadtest.adapters import write_random_adapter
    from server.config import EngineConfig
    from server.offline import LLM

    config = EngineConfig(model=str(workload.model), cache_dir=str(folder / "cache"), enable_prefix_cache=False)
    adapters = folder / "adapters"
    adapters.mkdir()
    llm = LLM(config, adapters=adapters)
    names = [f"bench-{index:03d}" for index in range(workload.num_adapters)]
    for index, name in enumerate(names):
        write_random_adapter(adapters / name, llm.manifest, workload.rank, seed=index)
    adapter_bytes = sum(llm.adapter(name).data_bytes for name in names)
    with_adapters: list[float] = []
    without: list[float] = []
    for _ in range(workload.repeats):  # in turn, so that the machine's drift falls on both
        without.append(_decode_step_s(llm, workload, [None] * len(names)))
        with_adapters.append(_decode_step_s(llm, workload, list(names)))
    bandwidth = read_bandwidth()
    llm.close()
    base_s, full_s = statistics.median(without), statistics.median(with_adapters)
    floor_s = adapter_bytes / bandwidth
    return {
        "rows (one adapter each)": len(names),
        "decode step without adapters, ms": base_s * 1e3,
        "decode step with adapters, ms": full_s * 1e3,
        "ratio of steps, with / without": full_s / base_s,
        "adapter bytes in a step, MB": adapter_bytes / 1e6,
        "read bandwidth in this run, GB/s": bandwidth / 1e9,
        "adapters' byte floor, ms": floor_s * 1e3,
        "adapters' cost over their floor": (full_s - base_s) / floor_s,
    }


def _decode_step_s(llm: LLM, workload: Workload, adapters: list[str | None]) -> float:
    """Median time of the steps in which every request decodes."""
    from server.engine.messages import SamplingParams

    params = SamplingParams(max_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
    core = llm.core
    open_ids = set()
    for index, adapter in enumerate(adapters):
        prompt = [3 + (7 * index + 11 * position) % 4000 for position in range(workload.prompt_tokens)]
        open_ids.add(llm.submit(prompt, adapter, params))
    times = []
    while open_ids:
        started = time.perf_counter()
        outputs = core.step()
        elapsed = time.perf_counter() - started
        if outputs.stats.rows == len(adapters) == len(outputs.outputs):
            times.append(elapsed)
        open_ids -= {output.request_id for output in outputs.outputs if output.finish_reason is not None}
    return statistics.median(times)
