"""The scheduler and the slots under load, in virtual time: steps and loads take what a model of a server says."""

from __future__ import annotations

import random
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters_store.ref import AdapterRef
from server.adapters.slots import AdapterSlots
from server.engine.batch import StepPlan, StepResult
from server.engine.blocks import BlockPool
from server.engine.limits import SchedulerLimits
from server.engine.messages import SamplingParams
from server.engine.request import Request
from server.engine.scheduler import Scheduler
from tests.unit.byte_device import PAGE
from tests.unit.scheduler_world import adapter


@dataclass(frozen=True)
class Costs:
    """Of the demo base on two cores; a load relative to a decode step as 80 MB over PCIe to a step of 10 ms."""

    step_s: float = 0.016
    decode_row_s: float = 0.0007
    prefill_row_s: float = 0.0008
    load_s: float = 0.32 * 0.020

    def of(self, plan: StepPlan) -> float:
        """Seconds of a step."""
        decodes = sum(item.is_decode for item in plan.items)
        return self.step_s + self.decode_row_s * decodes + self.prefill_row_s * (plan.num_rows - decodes)


@dataclass
class TimedDevice:
    """A SlotDevice without bytes: one load after the other, each done `load_s` after it began."""

    load_s: float
    now: float = 0.0
    _free_s: float = 0.0
    _loads: list[tuple[float, Future[None]]] = field(default_factory=list)

    def load(self, ref: AdapterRef, slot: int, offset_bytes: int) -> Future[None]:
        self._free_s = max(self._free_s, self.now) + self.load_s
        self._loads.append((self._free_s, Future()))
        return self._loads[-1][1]

    def advance(self, now: float) -> None:
        self.now = now
        while self._loads and self._loads[0][0] <= now:
            self._loads.pop(0)[1].set_result(None)

    def commit(self, ref: AdapterRef, slot: int, offset_bytes: int) -> None: ...

    def clear(self, slot: int) -> None: ...

    def move(self, ref: AdapterRef, slot: int, old_offset: int, new_offset: int, nbytes: int) -> None: ...

    def check_table(self, residents: Iterable[tuple[int, AdapterRef, int]]) -> None: ...


@dataclass
class Outcome:
    first_s: list[float]  # time to first token of each request
    loads: int
    num_errors: int
    seconds: float

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.first_s, percent))


def run_load(
    *,
    hot: int,
    room: int,
    rate: float,
    num_requests: int = 400,
    prompt: int = 128,
    output: int = 64,
    costs: Costs | None = None,
    seed: int = 0,
    **limits: Any,
) -> Outcome:
    """Poisson arrivals of requests for `hot` adapters alike, over an arena with room for `room` of them."""
    rng, costs = random.Random(seed), costs or Costs()
    device = TimedDevice(costs.load_s)
    slots = AdapterSlots(arena_bytes=room * PAGE, max_slots=hot + 1, device=device, clock=lambda: device.now)
    defaults = {
        "max_num_seqs": 64, "max_step_tokens": 512, "max_mixed_prefill": 128, "max_adapters_per_step": 64,
        "max_model_len": 4096, "max_wait_s": 1e9,
    }  # fmt: skip
    blocks = BlockPool(8192, 16, has_prefix_cache=False)
    scheduler = Scheduler(SchedulerLimits(**(defaults | limits)), blocks, slots)
    refs = [adapter(f"h{index}") for index in range(hot)]
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    arrivals, at = [], 0.0
    for _ in range(num_requests):
        at += rng.expovariate(rate)
        arrivals.append((at, refs[rng.randrange(hot)]))
    first: dict[str, float] = {}
    num_added = num_ended = num_errors = 0
    now = 0.0
    while num_ended < num_requests:
        while num_added < num_requests and arrivals[num_added][0] <= now:
            arrival_s, ref = arrivals[num_added]
            scheduler.add(Request(str(num_added), [1] * prompt, prompt, params, arrival_s=arrival_s, adapter=ref))
            slots.prefetch(ref)
            num_added += 1
        device.advance(now)
        assert not slots.poll()
        plan = scheduler.schedule(now)
        num_ended += len(plan.ended)
        num_errors += len(plan.ended)
        if not plan.items:
            now += 0.001
            continue
        now += costs.of(plan)
        result = StepResult(tokens={item.request.request_id: 5 for item in plan.items if item.samples})
        for output_ in scheduler.collect(plan, result, now):
            first.setdefault(output_.request_id, now - arrivals[int(output_.request_id)][0])
            num_ended += output_.finish_reason is not None
    scheduler.check_integrity()
    slots.check_integrity()
    return Outcome(list(first.values()), slots.loads, num_errors, now)
