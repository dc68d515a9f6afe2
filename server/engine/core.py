"""EngineCore: one step is schedule, dispatch, collect. No I/O, no threads, no waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from adapters_store.errors import AdapterError
from adapters_store.ref import AdapterRef
from server.adapters.slots import AdapterSlots
from server.engine.batch import Batch, BatchBuilder
from server.engine.messages import (
    AdapterFailed,
    AddRequest,
    EngineReady,
    RequestError,
    RequestOutput,
    StepOutputs,
    StepStats,
)
from server.engine.request import Request
from server.engine.scheduler import Scheduler


class Runner(Protocol):
    """What the core needs of the model: start a step, and later its sampled ids."""

    def dispatch(self, batch: Batch) -> object: ...

    def collect(self, handle: object) -> npt.NDArray[np.int64]: ...


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
        on_close: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ready = ready
        self.scheduler = scheduler
        self.slots = slots
        self._batches = batches
        self._runner = runner
        self._phases_of = phases_of
        self._on_close = on_close
        self._clock = clock
        self._last_step = StepStats()
        self._early: list[RequestOutput] = []  # terminal events of requests that ended between steps

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
        )
        refusal = self.scheduler.add(request)
        if refusal is not None:
            self._early.append(_failed(request.request_id, refusal))
        elif message.adapter is not None:
            self._prefetch(message.adapter)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests with finish reason "abort"; unknown ids are requests that already ended."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        """The image behind `key` is on disk."""
        self.scheduler.adapter_ready(key, ref)
        self._prefetch(ref)

    def adapter_failed(self, message: AdapterFailed) -> None:
        """The image behind the message's key will not come: the requests pending it end with its error."""
        self.scheduler.adapter_failed(
            message.key, RequestError(status=message.status, code=message.code, message=message.message)
        )

    def has_work(self) -> bool:
        """Whether a step could change anything."""
        return bool(self._early) or self.scheduler.has_work or self.slots.num_loading > 0

    def step(self) -> StepOutputs:
        """Finish loads, pick rows, run them, collect. Outputs may be empty (nothing could run yet)."""
        started = self._clock()
        for image_key, error in self.slots.poll():
            self.scheduler.load_failed(image_key, _load_error(error))
        plan = self.scheduler.schedule(started)
        outputs = self._early + [_ended(request) for request in plan.ended]
        self._early = []
        if plan.items:
            batch = self._batches.build(plan)
            tokens = self._runner.collect(self._runner.dispatch(batch))
            outputs += self.scheduler.collect(plan, _by_request(batch, tokens), self._clock())
            self._last_step = self._row_stats(batch, self._clock() - started)
        return StepOutputs(outputs=[self._with_phases(output) for output in outputs], stats=self._stats())

    def check_integrity(self) -> None:
        """Assert that nothing leaked: blocks, refs, queues."""
        self.scheduler.check_integrity()
        self.slots.check_integrity()

    def close(self) -> None:
        """Release threads and memory."""
        self._on_close()

    def _prefetch(self, ref: AdapterRef) -> None:
        self.slots.prefetch(ref)

    def _with_phases(self, output: RequestOutput) -> RequestOutput:
        """Add the load's own phases (host, device) to a first output."""
        if output.phases is None:
            return output
        image_key = self.scheduler.adapter_key_of(output.request_id)
        return output

    def _row_stats(self, batch: Batch, step_s: float) -> StepStats:
        adapter_rows = sum(
            item.num_tokens for item, slot in zip(batch.items, batch.row_slots, strict=True) if slot
        )
        return StepStats(
            rows=batch.num_rows,
            adapter_rows=adapter_rows,
            distinct_adapters=len(set(batch.row_slots) - {0}),
            step_s=step_s,
        )

    def _stats(self) -> StepStats: ...


def _by_request(batch: Batch, tokens: npt.NDArray[np.int64]) -> dict[str, int]:
    return {
        item.request.request_id: token
        for item, token in zip(batch.sample_items, tokens.tolist(), strict=True)
    }
