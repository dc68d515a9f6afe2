"""An engine in this process: AsyncEngine's protocol and streams, no socket. For tests and offline use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from adapters_store.ref import AdapterRef
from server.engine.loop import Core, Pace, apply, describe_error
from server.engine.messages import (
    Abort,
    AdapterFailed,
    AdapterReady,
    AddRequest,
    DropAdapter,
    EngineReady,
    PinAdapter,
    PrefetchAdapter,
    RequestError,
    RequestOutput,
    SetWeight,
    StepOutputs,
    StepStats,
    ToEngine,
)
from server.engine.progress import Progress
from server.engine.residents import Residents
from server.engine.streams import Streams, Taker

MAX_WAIT_S = 0.01  # between two turns that had nothing to do

logger = logging.getLogger(__name__)


class InprocEngine:
    """Steps `core` on one thread of its own while requests are open; idle, it runs nothing.

    Messages wait in a list and are applied between steps, on that thread, so the core sees one caller.
    It may be used from several event loops one after the other (each asyncio.run of an offline script).
    """

    def __init__(self, core: Core) -> None:
        self.died = asyncio.Event()
        self.residents = Residents()
        self.end_reason: str | None = None
        self._core = core
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._streams = Streams(self._send)
        self._inbox: list[ToEngine] = []
        self._driver: asyncio.Task[None] | None = None
        self._last_stats = StepStats()
        self._turned_s = time.monotonic()
        self._progress = Progress()

    @property
    def ready(self) -> EngineReady:
        return self._core.ready

    @property
    def is_alive(self) -> bool:
        return self._streams.is_admitting

    @property
    def last_stats(self) -> StepStats:
        return self._last_stats

    @property
    def silent_s(self) -> float:
        """Seconds that the step in progress has taken; 0 when none is."""
        is_driven = self._driver is not None and not self._driver.done()
        return time.monotonic() - self._turned_s if is_driven else 0.0

    @property
    def stuck_s(self) -> float:
        return self._progress.stuck_s

    @property
    def num_open(self) -> int:
        return len(self._streams.open_ids)

    def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """See Engine."""
        self._streams.check()
        return self._streams.stream(request)

    def divert(self, request_id: str, take: Taker) -> None:
        self._streams.divert(request_id, take)

    def abort(self, request_id: str) -> None:
        self._streams.abort(request_id)

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        self._send(AdapterReady(key, ref))

    def adapter_failed(self, key: str, status: int, code: str, message: str) -> None:
        self._send(AdapterFailed(key, status, code, message))

    def pin_adapter(self, ref: AdapterRef) -> None:
        self._send(PinAdapter(ref))

    def drop_adapter(self, image_key: str) -> None:
        self._send(DropAdapter(image_key))

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"]) -> None:
        self._send(PrefetchAdapter(ref, tier))

    def set_weight(self, name: str, weight: float) -> None:
        self._send(SetWeight(name, weight))

    async def close(self, timeout_s: float = 10.0) -> None:
        """Abort what is open, check that nothing leaked, close the core."""
        if self.end_reason is None:
            self._streams.refuse("The engine is closed.")
            if self._streams.open_ids:
                self._send(Abort(self._streams.open_ids))
            if self._driver is not None and not self._driver.done():  # a done one may be of a closed loop
                await asyncio.wait({self._driver}, timeout=timeout_s)
        is_idle = self._driver is None or self._driver.done()
        is_clean = self.end_reason is None and is_idle
        self._end("closed")
        if self._driver is not None and not is_idle:
            self._driver.cancel()
        self._thread.shutdown(wait=is_idle)
        if is_clean:
            self._core.check_integrity()
            self._core.close()

    def _send(self, message: ToEngine) -> None:
        """Have the driver apply it; starts one if none runs. Called on the event loop."""
        if self.end_reason is not None:
            return
        self._inbox.append(message)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive(), name="engine driver")

    async def _drive(self) -> None:
        """Task: apply, step, deliver, for as long as there is anything open or to do."""
        loop = asyncio.get_running_loop()
        pace = Pace()
        try:
            while True:
                messages, self._inbox = self._inbox, []
                self._turned_s = time.monotonic()
                outputs, has_work = await loop.run_in_executor(self._thread, self._turn, messages)
                self._last_stats = outputs.stats
                self._progress.take(outputs)
                self.residents.apply(outputs.slot_changes)
                await self._streams.deliver(outputs.outputs)
                if not (has_work or self._inbox or self._streams.open_ids):
                    return
                wait_s = pace.wait_s(outputs, has_work=has_work, now_s=time.monotonic())
                await asyncio.sleep(min(wait_s, MAX_WAIT_S))
        except Exception as error:  # what is the process boundary with AsyncEngine
            logger.exception("the engine failed")
            self._end(describe_error(error))
            self.died.set()

    def _turn(self, messages: list[ToEngine]) -> tuple[StepOutputs, bool]:
        """On the engine's thread: apply the messages and step once; whether there is more to do."""
        for message in messages:
            apply(self._core, message)
        return self._core.step(), self._core.has_work()

    def _end(self, reason: str) -> None:
        if self.end_reason is not None:
            return
        self.end_reason = reason
        self._streams.refuse("The engine has stopped.")
        self._streams.fail_all(
            RequestError(status=503, code="engine_dead", message="The engine stopped before this request ended.")
        )
