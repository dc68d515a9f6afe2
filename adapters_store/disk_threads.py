"""Threads for the raw tier's work on the disk: writing, hashing and deleting whole adapters.

Apart from the event loop's own, which requests need: a disk that stalls here holds up remote adapters alone.
They give way to the engine's steps and the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from adapters_store.cpus import available_cpus

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NICENESS = 10
"""not the most: the event loop waits for the interpreter's lock while a thread that has it is kept from a processor"""
NUM_THREADS = max(2, min(8, available_cpus()))
"""more than processors get little more done where the disk keeps up, and each may have the interpreter's lock when the
loop wants it"""


def give_way(niceness: int = NICENESS) -> None:
    """Lower the calling thread's priority, and that of threads that it starts. Where threads have none: nothing."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


RAW_THREADS = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="raw", initializer=give_way)
"""One for all sources and the tier: the bound is the process's. Threads start when they are needed."""


def submit_raw(work: Callable[[*Ts], T], *args: *Ts) -> Future[T]:
    """Have `work` done in one of the threads."""
    return RAW_THREADS.submit(work, *args)


def in_raw_thread(work: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
    """What `work` returns, done in one of the threads; it goes on when the caller is cancelled."""
    return asyncio.wrap_future(submit_raw(work, *args))
