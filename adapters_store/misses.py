"""What did not work moments ago: remembered for a bounded time and for a bounded number of things."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from adapters_store.errors import AdapterError, adapter_error

MAX_ENTRIES = 4096


class Misses:
    """Errors by key. Each is forgotten after `ttl_s` seconds, the oldest earlier when there are too many."""

    def __init__(
        self, ttl_s: float, *, max_entries: int = MAX_ENTRIES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, str, str]] = OrderedDict()  # end of life, code, message

    def add(self, key: str, error: AdapterError) -> None:
        """Remember that `key` failed."""
        self._entries[key] = (self._clock() + self._ttl_s, error.code, error.message)
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def get(self, key: str) -> AdapterError | None:
        """The error of `key`, as a new object for each who raises it; None when there was none lately."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        ends_at, code, message = entry
        if self._clock() >= ends_at:
            del self._entries[key]
            return None
        return adapter_error(code, message)

    def forget(self, key: str) -> None:
        """`key` works, or is worth another try."""
        self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)
