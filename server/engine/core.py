"""EngineCore: one step is schedule, dispatch, collect. No I/O, no threads, no waiting but for the device.

With two steps in flight the next is dispatched before the last is collected, so that the device goes from one to
the other while the host is at the next but one:

    host    schedule, dispatch n+1 │ collect n: wait, append, free │ schedule, dispatch n+2 │ collect n+1 ...
    device  ────────── step n ──────────────▶│──────── step n+1 ─────────────────────────────▶│── step n+2
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from adapters_store.errors import AdapterError
from adapters_store.host import HostCache
from adapters_store.ref import AdapterRef
from server.adapters.slots import AdapterSlots
from server.engine.batch import Batch, BatchBuilder, StepPlan, StepResult
from server.engine.messages import (
    AdapterFailed,
    AddRequest,
    EngineReady,
    RequestError,
    RequestOutput,
    SlotChange,
    StepOutputs,
    StepStats,
)
from server.engine.request import Request
from server.engine.scheduler import Scheduler
from server.engine.tally import StepTally


class Runner(Protocol):
    """What the core needs of the model: start a step, and later what it gave. Steps run, and are collected, in the
    order of their dispatch; how many may be in flight is the scheduler's limit."""

    def dispatch(self, batch: Batch) -> Any: ...

    def collect(self, handle: Any) -> StepResult: ...


class EngineCore:
    """The engine's state and its one transition, `step()`. Driven by loop.py, inproc.py, or a test.

    All calls come from one thread; only the slots' loads complete elsewhere, and `step()` polls them.
    """

    def __init__(
        self,
        *,
        ready: EngineReady,
        scheduler: Scheduler,
        batches: BatchBuilder,
        runner: Runner,
        slots: AdapterSlots,
        phases_of: Callable[[str], dict[str, float]],
        host: HostCache | None = None,
        warm: Callable[[AdapterRef], Future[None]] | None = None,
        on_close: Callable[[], None] = lambda: None,
        steps_in_flight: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ready = ready
        self.scheduler = scheduler
        self.slots = slots
        self._batches = batches
        self._runner = runner
        self._phases_of = phases_of
        self._on_close = on_close
        self._steps_in_flight = steps_in_flight  # the scheduler's limit
        self._clock = clock
        self._in_flight: deque[_Step] = deque()
        self._collected_s = 0.0
        self._last = _StepFacts()  # of the last step collected
        self._last_s = 0.0  # seconds that it took
        self._tally = StepTally()
        self._host = host
        self._warm = warm  # brings an image to host memory
        self._warming: dict[str, Future[None]] = {}  # by image key
        self._refused: list[RequestOutput] = []  # terminal events of requests refused at arrival

    def add(self, message: AddRequest) -> None:
        """Queue a request. One that can never run ends with the next step's outputs."""
        request = Request(
            request_id=message.request_id,
            token_ids=list(message.prompt_ids),
            num_prompt=len(message.prompt_ids),
            params=message.params,
            cache_salt=message.cache_salt,
            arrival_s=self._clock(),
            pending_key=message.pending,
            adapter=message.adapter,
            priority=message.priority,
        )
        if self.scheduler.add(request) is not None:
            self._refused.append(_ended(request))
        elif message.adapter is not None:
            self.slots.prefetch(message.adapter)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests with finish reason "abort"; unknown ids are requests that already ended."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        """The image behind `key` is on disk."""
        self.scheduler.adapter_ready(key, ref)
        self.slots.prefetch(ref)

    def pin_adapter(self, ref: AdapterRef) -> None:
        """Keep an image on the device, from the first moment there is room for it."""
        self.slots.pin(ref)

    def drop_adapter(self, image_key: str) -> None:
        """Let an image go, pinned or not, as soon as nothing uses it."""
        self.slots.drop(image_key)

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"]) -> None:
        """Bring an image to host memory where there is any, or to the device where nothing has to make way."""
        if tier == "device":
            self.slots.prefetch(ref)
        elif self._warm is not None:
            self._warming[ref.image_key] = self._warm(ref)

    def set_weight(self, name: str, weight: float) -> None:
        """The share of an adapter's requests, by its name."""
        self.scheduler.set_weight(name, weight)

    def adapter_failed(self, message: AdapterFailed) -> None:
        """The image behind the message's key will not come: the requests pending it end with its error."""
        self.scheduler.adapter_failed(
            message.key, RequestError(status=message.status, code=message.code, message=message.message)
        )

    def has_work(self) -> bool:
        """Whether a step could change anything."""
        has_steps = bool(self._in_flight) or self.scheduler.has_work
        return has_steps or bool(self._refused) or self.slots.num_loading > 0

    def step(self) -> StepOutputs:
        """Finish loads, pick rows, dispatch them, collect the oldest step. Outputs may be empty: nothing ran."""
        for image_key, error in self.slots.poll():
            self.scheduler.load_failed(image_key, _load_error(error))
        outputs, self._refused = self._refused, []
        while len(self._in_flight) < self._steps_in_flight:
            plan = self.scheduler.schedule(self._clock())
            outputs += [_ended(request) for request in plan.ended]
            if not plan.items:
                break
            self._dispatch(plan)
        if self._in_flight:
            outputs += self._collect(self._in_flight.popleft())
        changes = self.slots.take_changes() + self._host_changes() + self._failed_warmings()
        for change in changes:
            if change.state == "ready":
                self._tally.load(self._phases_of(change.image_key))
        return StepOutputs(outputs=outputs, stats=self._stats(), slot_changes=changes)

    def _dispatch(self, plan: StepPlan) -> None:
        started = self._clock()
        batch = self._batches.build(plan)
        handle = self._runner.dispatch(batch)
        self._in_flight.append(_Step(plan, handle, _StepFacts.of(batch), started))

    def _collect(self, step: _Step) -> list[RequestOutput]:
        result = self._runner.collect(step.handle)
        now = self._clock()
        step_s = now - max(step.started_s, self._collected_s)  # before that it waited for the step before it
        self._collected_s = now
        self._last, self._last_s = step.facts, step_s
        self._tally.step(step.facts.rows, step.facts.distinct_adapters)
        image_keys = {item.request.request_id: item.request.adapter_key for item in step.plan.items}
        outputs = self.scheduler.collect(step.plan, result, now)
        return [self._with_load_phases(output, image_keys) for output in outputs]

    def check_integrity(self) -> None:
        """Assert that nothing leaked or differs: blocks, refs, queues, the device's table of adapters.

        What the steps in flight hold is no leak; with has_work() False there are none.
        """
        self.scheduler.check_integrity()
        self.slots.check_integrity()

    def close(self) -> None:
        """Release threads and memory."""
        self._on_close()

    def _host_changes(self) -> list[SlotChange]:
        changes = self._host.take_changes() if self._host else []
        return [SlotChange(image_key, "hosted" if is_held else "unhosted") for image_key, is_held in changes]

    def _failed_warmings(self) -> list[SlotChange]:
        done = {key: future for key, future in self._warming.items() if future.done()}
        for key in done:
            del self._warming[key]
        return [SlotChange(key, "failed", str(error)) for key, future in done.items() if (error := future.exception())]

    def _with_load_phases(self, output: RequestOutput, image_keys: dict[str, str]) -> RequestOutput:
        """The output, with the load's own phases when its request had to wait for the load."""
        if not output.phases or not output.phases.get("adapter_wait_s"):
            return output
        load = self._phases_of(image_keys.get(output.request_id, ""))
        named = {f"load_{phase}_s": seconds for phase, seconds in load.items()}
        return msgspec.structs.replace(output, phases=output.phases | named)

    def _stats(self) -> StepStats:
        return msgspec.structs.replace(
            self.scheduler.stats(),
            rows=self._last.rows,
            adapter_rows=self._last.adapter_rows,
            distinct_adapters=self._last.distinct_adapters,
            step_s=self._last_s,
            adapter_loads=self.slots.loads,
            adapter_evictions=self.slots.evictions,
            resident_adapters=self.slots.resident,
            adapter_bytes_used=self.slots.bytes_used,
            adapter_acquires=self.slots.acquires,
            load_seconds=self._tally.load_seconds,
            steps_by_rows=self._tally.rows.counts,
            rows_total=self._tally.rows.total,
            steps_by_adapters=self._tally.adapters.counts,
            adapters_total=self._tally.adapters.total,
            host_images=self._host.num_images if self._host else 0,
            host_bytes_used=self._host.bytes_used if self._host else 0,
            host_hits=self._host.hits if self._host else 0,
            host_evictions=self._host.evictions if self._host else 0,
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """One that was dispatched and is not collected."""

    plan: StepPlan
    handle: Any
    facts: _StepFacts
    started_s: float


@dataclass(frozen=True, slots=True)
class _StepFacts:
    """What a step looked like."""

    rows: int = 0
    adapter_rows: int = 0
    distinct_adapters: int = 0

    @classmethod
    def of(cls, batch: Batch) -> _StepFacts:
        rows = [(item.num_tokens, slot) for item, slot in zip(batch.items, batch.row_slots, strict=True)]
        return cls(
            rows=batch.num_rows,
            adapter_rows=sum(count for count, slot in rows if slot),
            distinct_adapters=len({slot for _, slot in rows if slot}),
        )


def _ended(request: Request) -> RequestOutput:
    """The terminal event of a request that ended without a row in this step."""
    return RequestOutput(request_id=request.request_id, finish_reason=request.finish_reason, error=request.error)


def _load_error(error: Exception) -> RequestError:
    if isinstance(error, AdapterError):
        return RequestError(status=error.http_status, code=error.code, message=error.message)
    return RequestError(status=500, code="adapter_error", message=f"The adapter could not be loaded: {error}")
