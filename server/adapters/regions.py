"""First-fit allocation of byte ranges in the device arena. Bookkeeping only."""

from __future__ import annotations

from bisect import bisect_left

ALIGNMENT = 4096  # of every region, bytes: a page, and more than any kernel asks for


def region_bytes(nbytes: int) -> int:
    """The bytes that a region for `nbytes` takes: rounded up to whole pages, at least one."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class Regions:
    """The taken ranges of [0, capacity). All offsets and sizes are multiples of ALIGNMENT."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used_bytes = 0
        self._starts: list[int] = []  # ascending
        self._sizes: dict[int, int] = {}  # by start

    def find(self, nbytes: int, low: int = 0, high: int | None = None) -> int | None:
        """The first free range of `nbytes` within [low, high), neither of which lies inside a taken range."""
        high = self.capacity if high is None else high
        cursor = low
        for start in self._starts[bisect_left(self._starts, low) :]:
            if min(start, high) - cursor >= nbytes:
                return cursor
            if start >= high:
                return None
            cursor = start + self._sizes[start]
        return cursor if high - cursor >= nbytes else None

    def take(self, offset: int, nbytes: int) -> None:
        index = bisect_left(self._starts, offset)
        self._starts.insert(index, offset)
        self._sizes[offset] = nbytes
        self.used_bytes += nbytes

    def free(self, offset: int) -> None:
        del self._starts[bisect_left(self._starts, offset)]
        self.used_bytes -= self._sizes.pop(offset)

    def check(self, taken: dict[int, int]) -> None:
        """Assert that exactly `taken` (size by offset) is taken, aligned, in bounds and without overlap."""
        assert self._sizes == taken and self._starts == sorted(taken), "regions differ from the images'"
        assert self.used_bytes == sum(taken.values()) <= self.capacity
        ends = [0, *(start + self._sizes[start] for start in self._starts)]
        for end, start in zip(ends, [*self._starts, self.capacity], strict=True):
            assert end <= start, f"regions overlap at {start}"
        assert all(start % ALIGNMENT == 0 and size % ALIGNMENT == 0 for start, size in taken.items())
