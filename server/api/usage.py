"""What became of each adapter since the server started: how often and when it was used, and its last error."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

MAX_NAMES = 16384  # remembered; the least recently used go first


@dataclass(slots=True)
class Usage:
    """One name's record; times are time.time(), 0.0 = never."""

    num_uses: int = 0
    last_used_s: float = 0.0
    last_error: str | None = None  # of the last load, until one succeeds
    last_error_s: float = 0.0


class UsageLog:
    """The records by name."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Usage] = OrderedDict()

    def of(self, name: str) -> Usage:
        """The record as it is; an empty one for a name that was never used."""
        return self._records.get(name) or Usage()

    def used(self, name: str) -> None:
        """A request asked for it."""
        record = self._record(name)
        record.num_uses += 1
        record.last_used_s = time.time()

    def failed(self, name: str, message: str) -> None:
        """It could not be brought to disk, or the engine refused its image."""
        record = self._record(name)
        record.last_error, record.last_error_s = message, time.time()

    def succeeded(self, name: str) -> None:
        """Its image is on disk."""
        if name in self._records:
            self._records[name].last_error = None

    def _record(self, name: str) -> Usage:
        record = self._records.setdefault(name, Usage())
        self._records.move_to_end(name)
        if len(self._records) > MAX_NAMES:
            self._records.popitem(last=False)
        return record
