"""Trying again where that can help: exponential backoff with jitter, bounded in tries and in seconds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from adapters_store.errors import SourceUnavailable

T = TypeVar("T")


class Passing(Exception):
    """A failure that may pass: a timeout, a reset, 408, 429, 5xx. The text reaches clients: no secrets in it."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s  # for this long the store asks to be left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and for how long one request is tried."""

    attempts: int = 5
    total_s: float = 30.0
    """no further try is begun once this much has passed since the first, or since one that got further"""
    first_s: float = 0.1
    """the first pause, which doubles from try to try; each is drawn between half and all of it"""
    max_s: float = 5.0

    async def run(
        self, what: str, request: Callable[[], Awaitable[T]], *, progress: Callable[[], int] = lambda: 0
    ) -> T:
        """The result of `request`, which is tried anew after a Passing; then SourceUnavailable.

        `what` begins the message: what was asked of whom. `progress` is how far the tries have come: one that came
        further than all before it counts as the first.
        """
        started, attempt, furthest = time.monotonic(), 1, progress()
        while True:
            try:
                return await request()
            except Passing as failure:
                if progress() > furthest:
                    started, attempt, furthest = time.monotonic(), 1, progress()
                pause = max(self._pause_s(attempt), failure.after_s)
                if attempt == self.attempts or time.monotonic() - started + pause > self.total_s:
                    tries = "1 try" if attempt == 1 else f"{attempt} tries"
                    raise SourceUnavailable(f"{what}: {failure}, after {tries}") from None
            await asyncio.sleep(pause)
            attempt += 1

    def _pause_s(self, attempt: int) -> float:
        pause = min(self.max_s, self.first_s * 2.0 ** (attempt - 1))
        return pause * random.uniform(0.5, 1.0)


async def within(limit_s: float, answer: Awaitable[T]) -> T:
    """What `answer` gives, if it comes in time; else Passing."""
    try:
        async with asyncio.timeout(limit_s):
            return await answer
    except TimeoutError:
        raise Passing("it does not answer in time") from None
