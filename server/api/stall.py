"""An engine that has stopped getting on: what the probes and the gate ask, and who need not wait for it any longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from server.engine.client import Engine
from server.errors import EngineStalled

CHECK_S = 0.5  # between two looks at the requests that wait
QUEUE_MARGIN_S = 10.0  # beyond --max-queue-wait; the engine ends by itself what has waited for that
STALL_RETRY_AFTER_S = 5  # about what a replacement needs to be found

ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class _Wait:
    """A request that has gone to the engine."""

    bound: asyncio.Timeout
    has_begun: Callable[[], bool]  # whether an event of it has come
    since_s: float


class StallGuard:
    """Refuses what comes while the engine is stalled, and ends what waits for its first event then."""

    def __init__(self, engine: Engine, *, stall_timeout_s: float, max_queue_wait_s: float) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._max_wait_s = max_queue_wait_s + QUEUE_MARGIN_S
        self._waits: set[_Wait] = set()

    @property
    def is_stalled(self) -> bool:
        """Whether for the stall time-out it has said nothing, or its requests did not get on."""
        return self._stalled_s > self._stall_timeout_s

    @property
    def _stalled_s(self) -> float:
        return max(self._engine.silent_s, self._engine.stuck_s)

    def check(self) -> None:
        """Raises EngineStalled if it is."""
        if self.is_stalled:
            raise _stalled()

    async def answer(self, work: Awaitable[ResultT], has_begun: Callable[[], bool]) -> ResultT:
        """The result of `work`, which waits for the engine. Raises EngineStalled if that stalls before the first event.

        With a stall time-out above --max-queue-wait, so does a request that the engine, silent, has left waiting for
        longer than that. What has begun goes on when the engine does.
        """
        wait: _Wait | None = None
        try:
            async with asyncio.timeout(None) as bound:
                wait = _Wait(bound, has_begun, time.monotonic())
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if bound.expired():
                raise _stalled() from None
            raise

    async def watch(self) -> None:
        """Look after the requests that wait; until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            self._end_waits()

    def _end_waits(self) -> None:
        stalled_s = self._stalled_s
        least_s = min(self._stall_timeout_s, self._max_wait_s)
        if stalled_s <= least_s:
            return
        now = asyncio.get_running_loop().time()
        for wait in list(self._waits):
            waited_s = time.monotonic() - wait.since_s
            is_over = stalled_s > self._stall_timeout_s or waited_s > self._max_wait_s
            if is_over and not wait.has_begun():
                self._waits.discard(wait)  # a time-out that has expired can't be set again
                wait.bound.reschedule(now)


def _stalled() -> EngineStalled:
    return EngineStalled(
        "The engine has stopped getting on; the server takes no new requests until it does.",
        retry_after_s=STALL_RETRY_AFTER_S,
    )
