"""Threads for the raw tier's work on the disk: writing, hashing and deleting whole adapters.

Apart from the event loop's own, which requests need: a disk that stalls here holds up remote adapters alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

RAW_THREADS = ThreadPoolExecutor(8, thread_name_prefix="raw")
"""One for all sources and the tier: the bound is the process's. Threads start when they are needed."""


def submit_raw(work: Callable[[*Ts], T], *args: *Ts) -> Future[T]:
    """Have `work` done in one of the threads."""
    return RAW_THREADS.submit(work, *args)


def in_raw_thread(work: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
    """What `work` returns, done in one of the threads; it goes on when the caller is cancelled."""
    return asyncio.wrap_future(submit_raw(work, *args))
