"""Sends a workload and keeps what comes back.

Open loop: every request goes out at its time, whatever the server does, and its latencies count from that time, so a
late generator can't make a server look fast. Closed loop: the next request goes out when one has ended.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.arrivals import Arrivals
from loadtest.outcome import Outcome, read_outcome
from loadtest.wire import Exchange, Target, exchange
from loadtest.workload import Request

_LEAD_S = 0.05  # between the clock's zero and now, so that the first request isn't late
_MAX_UNREAD_BYTES = 256 << 20  # beyond it outcomes are read while the run goes on


@dataclass
class Progress:
    """How far a run is; written by the client, read by whoever shows it."""

    num_requests: int
    num_sent: int = 0
    num_ended: int = 0
    num_failed: int = 0


class Send(Protocol):
    """Puts one request on the wire; `due` by `time.perf_counter`."""

    async def __call__(self, request: Request, due: float) -> Exchange: ...


@dataclass(frozen=True)
class Run:
    """What came of a workload."""

    outcomes: list[Outcome]  # by the requests' order
    started: float  # by `time.perf_counter`
    duration_s: float  # from the start to the last byte of all


def http_sender(target: Target, encoded: Mapping[int, bytes], timeout_s: float) -> Send:
    """Sends over HTTP what `encoded` has for a request's index, ready to be written."""

    async def send(request: Request, due: float) -> Exchange:
        return await exchange(target, encoded[request.index], due, timeout_s)

    return send


async def run(
    send: Send,
    arrivals: Arrivals,
    requests: Sequence[Request],
    progress: Progress,
    max_concurrency: int | None = None,
) -> Run:
    """Send all and wait for all. `max_concurrency` bounds an open loop too, where waiting for it counts as latency."""
    num_at_once = min(arrivals.bounded(max_concurrency) or len(requests), len(requests))
    raise_file_limit(num_at_once)
    gc.collect()
    gc.freeze()
    reader = _Reader()
    started = time.perf_counter() + _LEAD_S
    limit = asyncio.Semaphore(num_at_once)

    async def one(request: Request, due: float) -> None:
        progress.num_sent += 1
        done = await send(request, due)
        limit.release()
        progress.num_ended += 1
        progress.num_failed += done.has_failed
        reader.take(request, done)

    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            due = started + request.at_s
            if arrivals.is_open:
                await asyncio.sleep(due - time.perf_counter())
            await limit.acquire()
            tasks.create_task(one(request, due if arrivals.is_open else time.perf_counter()))
    gc.unfreeze()
    outcomes = sorted(reader.read_all(), key=lambda outcome: outcome.index)
    return Run(outcomes, started, max(outcome.ended for outcome in outcomes) - min(o.due for o in outcomes))


def raise_file_limit(num_connections: int) -> None:
    """Open files for so many connections at once. Errors: RuntimeError where the hard limit is lower."""
    needed = num_connections + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(f"{num_connections} connections need {needed} open files; the hard limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass
class _Reader:
    """Puts reading off to the end of the run, within a bound of memory."""

    unread: deque[tuple[Request, Exchange]] = field(default_factory=deque)
    unread_bytes: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def take(self, request: Request, done: Exchange) -> None:
        self.unread.append((request, done))
        self.unread_bytes += sum(len(data) for _, data in done.parts)
        if self.unread_bytes > _MAX_UNREAD_BYTES:
            self.read_all()

    def read_all(self) -> list[Outcome]:
        while self.unread:
            request, done = self.unread.popleft()
            outcome = Outcome(request.index, request.adapter, request.max_tokens, done.due, done.begun, done.ended)
            outcome.connect_s = max(0.0, done.sent - done.begun)
            self.outcomes.append(read_outcome(done, outcome))
        self.unread_bytes = 0
        return self.outcomes
