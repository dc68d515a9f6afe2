"""Work under way, by key: whoever asks for the same thing meanwhile waits for the same work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from adapters_store.errors import AdapterUnavailable

T = TypeVar("T")


@asynccontextmanager
async def turn(turns: asyncio.Semaphore, limit_s: float | None, refusal: str) -> AsyncIterator[None]:
    """One of the turns in the block; AdapterUnavailable(refusal) when there is none for `limit_s` seconds."""
    try:
        async with asyncio.timeout(limit_s):
            await turns.acquire()
    except TimeoutError:
        raise AdapterUnavailable(refusal) from None
    try:
        yield
    finally:
        turns.release()


class _Flight(Generic[T]):
    """One piece of work and how many callers wait for it."""

    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.waiters = 0


class Flights(Generic[T]):
    """At most one task per key. Lives on one event loop.

    Cancelling one caller leaves the others waiting; the work is cancelled when the last has left. Nothing is
    remembered of work that has ended.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The outcome of the work of `key`: of what is under way, else of `start`."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = self._take_off(key, start())
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
                self._land(key, flight)

    def waiters(self, key: str) -> int:
        """How many callers wait for `key`."""
        return self._flights[key].waiters if key in self._flights else 0

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_off(self, key: str, work: Coroutine[Any, Any, T]) -> _Flight[T]:
        flight = _Flight(asyncio.create_task(work))
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: str, flight: _Flight[T]) -> None:
        """Take a flight off the books; one that was given up may have a successor under its key by then."""
        if self._flights.get(key) is flight:
            del self._flights[key]
