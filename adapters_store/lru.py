"""What the folders of the disk tiers share: who is there, who is needed, what goes when the quota is reached."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

STALE_TEMPORARY_S = 3600.0
LOCK_S = 2.0  # that a folder's lock is waited for
TOUCH_S = 10.0  # how exact the order of use on disk is


class Resident(msgspec.Struct):
    """A file or a folder that is there."""

    num_bytes: int
    used_at: float
    """wall-clock seconds; kept as the mtime, so that the order of use survives a restart"""


R = TypeVar("R", bound=Resident)


class LeasedLru(Generic[R]):
    """Residents of one folder by key, under a byte quota. Not thread-safe.

    With a quota, unleased residents go, least recently used first; one used in the last `grace_s` seconds
    stays, so that it can't vanish between its arrival and the lease on it. The quota may be exceeded by what
    is leased or just used; on an event loop that is looked at again when it is no longer. Without a quota nothing goes.
    """

    def __init__(
        self,
        quota_bytes: int | None,
        *,
        path_of: Callable[[str], Path],
        drop: Callable[[str], None],
        grace_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`drop` takes a key out of `residents` and its files off the disk."""
        self.residents: dict[str, R] = {}
        """to look at; `put` and `pop` change it"""
        self.bytes_used = 0
        """of all residents"""
        self.evictions = 0
        self.leases: Counter[str] = Counter()
        self._quota_bytes = quota_bytes
        self._path_of = path_of
        self._drop = drop
        self._grace_s = grace_s
        self._later: asyncio.TimerHandle | None = None
        self._clock = clock

    def put(self, key: str, resident: R) -> None:
        """Take in a resident, in place of the one with its key."""
        self.pop(key)
        self.residents[key] = resident
        self.bytes_used += resident.num_bytes

    def pop(self, key: str) -> R | None:
        """Take out a resident, if it is there; leases on its key stay."""
        resident = self.residents.pop(key, None)
        if resident is not None:
            self.bytes_used -= resident.num_bytes
        return resident

    def touch(self, key: str) -> None:
        """Note a use."""
        now, resident = self._clock(), self.residents[key]
        if abs(now - resident.used_at) >= TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(self._path_of(key), (now, now))
        resident.used_at = now

    def lease(self, key: str) -> bool:
        """Pin a resident until `release`; whether it is there."""
        if key not in self.residents:
            return False
        self.leases[key] += 1
        self.touch(key)
        return True

    def release(self, key: str) -> None:
        """Give back one lease."""
        assert self.leases[key] > 0, f"released without a lease: {key}"
        self.leases[key] -= 1
        if not self.leases[key]:
            del self.leases[key]
            self.evict()

    def evict(self) -> None:
        """Bring the folder back under its quota, as far as leases and uses of late allow."""
        if self._quota_bytes is None or self.bytes_used <= self._quota_bytes:
            return
        now = self._clock()
        early_s: float | None = None
        for key, resident in sorted(self.residents.items(), key=lambda item: item[1].used_at):
            if self.bytes_used <= self._quota_bytes:
                return
            if self.leases.get(key):
                continue
            # a use in the future is another machine's clock, or this one's was put back
            age_s = abs(now - resident.used_at)
            if age_s < self._grace_s:
                early_s = early_s or self._grace_s - age_s  # the oldest comes first
                continue
            self._drop(key)
            self.evictions += 1
        if early_s is not None and self._later is None and self.bytes_used > self._quota_bytes:
            with contextlib.suppress(RuntimeError):  # no event loop: at the next release, then
                self._later = asyncio.get_running_loop().call_later(max(early_s, 0.05), self._evict_later)

    def close(self) -> None:
        """Nothing goes any more: another process may have the folder. From any thread."""
        self._quota_bytes = None

    def _evict_later(self) -> None:
        self._later = None
        self.evict()


def lock_folder(folder: Path, *, exclusive: bool, patience_s: float = LOCK_S) -> int:
    """Lock a tier's folder: alone for who evicts, shared for who only adds. OSError when it is taken.

    It is waited for a little: a server that starts sweeps the folder alone, whatever it does later.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() >= until_s:
                os.close(descriptor)
                raise OSError(
                    error.errno,
                    f"{folder} is in use by another server, and one of the two has a disk quota: give each its own",
                ) from error
        except OSError:
            os.close(descriptor)
            raise
        time.sleep(0.02)
