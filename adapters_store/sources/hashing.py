"""Hashes of a file that is still being written: what is there without a hole is hashed while the rest comes.

A file that is written anew from its start, as by a server that knows no ranges, is hashed anew when it is whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable

from adapters_store.disk_threads import in_raw_thread

STEP_BYTES = 4 << 20
"""hashed by one turn of a thread, at most"""
_LEAST_BYTES = 512 << 10  # worth a turn before the file is whole
_BLOCK_BYTES = 512 << 10


class FileHashes:
    """Digests of a file of which parts come in any order. Lives on one event loop."""

    def __init__(self, descriptor: int, algorithms: Iterable[str]) -> None:
        """`descriptor`: to read from. `algorithms`: names that hashlib knows."""
        self._followers = {name: _Follower(descriptor, name) for name in algorithms}
        self._beyond: dict[int, int] = {}  # start -> stop of what was written behind a hole
        self._whole = 0  # bytes that are there from the start on
        self._is_rewritten = False

    def note(self, start: int, stop: int) -> None:
        """The bytes [start, stop) were written."""
        if start < self._whole or start in self._beyond:
            self._is_rewritten = True
        if start <= self._whole:
            self._whole = max(self._whole, stop)
        else:
            self._beyond[start] = stop
        while (further := self._beyond.pop(self._whole, None)) is not None:
            self._whole = further
        for follower in self._followers.values():
            follower.follow(self._whole)

    async def finish(self) -> dict[str, str]:
        """By algorithm, the digest of what is there without a hole, hexadecimal. OSError when it can't be read."""
        for follower in self._followers.values():
            await follower.finish()
            if self._is_rewritten:
                follower.restart(self._whole)
                await follower.finish()
        return {name: follower.hexdigest() for name, follower in self._followers.items()}

    async def stop(self) -> None:
        """Hash no more; returns when no thread reads the file any longer, however often it is cancelled."""
        is_cancelled = False
        tasks = {task for follower in self._followers.values() if (task := follower.give_up()) is not None}
        while pending := {task for task in tasks if not task.done()}:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError:
                is_cancelled = True
        for task in tasks:
            task.exception()  # looked at, or asyncio complains that nobody did
        if is_cancelled:
            raise asyncio.CancelledError


class _Follower:
    """One algorithm's way through the file: a task while there is something to hash."""

    def __init__(self, descriptor: int, algorithm: str) -> None:
        self._descriptor = descriptor
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm, usedforsecurity=False)
        self._position = 0
        self._whole = 0
        self._least = _LEAST_BYTES
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def follow(self, whole: int) -> None:
        """So many bytes are there; hash on when they are worth a turn."""
        self._whole = whole
        self._start()

    def restart(self, whole: int) -> None:
        """From the start again; no task is at work."""
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False)
        self._position = 0
        self.follow(whole)

    async def finish(self) -> None:
        """Until all that is there is hashed."""
        self._least = 1
        self._start()
        if self._task is not None:
            await asyncio.shield(self._task)

    def hexdigest(self) -> str:
        """Of what was hashed so far."""
        return self._hash.hexdigest()

    def give_up(self) -> asyncio.Task[None] | None:
        """Begin no further turn; the task that may be in one."""
        self._is_over = True
        return self._task

    def _start(self) -> None:
        if self._has_work() and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    def _has_work(self) -> bool:
        return not self._is_over and self._whole - self._position >= self._least

    async def _run(self) -> None:
        while self._has_work():
            stop = min(self._whole, self._position + STEP_BYTES)
            await in_raw_thread(self._read, self._position, stop)
            self._position = stop

    def _read(self, position: int, stop: int) -> None:
        """Hash the bytes [position, stop). Blocking."""
        block = memoryview(bytearray(_BLOCK_BYTES))
        while position < stop:
            count = os.preadv(self._descriptor, [block[: stop - position]], position)
            if count == 0:
                raise OSError("the file became shorter while it was hashed")
            self._hash.update(block[:count])
            position += count
