"""Device memory on the CPU is there before a load needs it: a page's first touch costs more than reading it full."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

from kernels.memory import populate

HEADROOM_BYTES = 64 << 20  # beyond what was used so far; at most an eighth of all
_SLICE_BYTES = 2 << 20  # at once: while one is populated, other mappings of this process wait
_REST = 9  # times a slice's own time, after it: so they take a tenth of a core


class TouchAhead:
    """Touches memory a little ahead of its use, from its start on, in a thread that takes little and seldom.

    Not one of low priority: that is kept from a processor while it populates, and who maps memory waits for it.
    What it touches keeps its contents, so it needs no agreement with who writes there. Where the system can't
    populate memory nothing is touched ahead.
    """

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        """`memory` starts at a page."""
        self.touched_bytes = 0
        self._memory = memory
        self._headroom = min(HEADROOM_BYTES, len(memory) // 8)
        self._used_bytes = 0
        self._is_closed = False
        self._has_news = threading.Event()
        self._has_news.set()
        threading.Thread(target=self._run, name="touch-ahead", daemon=True).start()

    def use(self, end: int) -> None:
        """The first `end` bytes may be in use from now on."""
        if end > self._used_bytes:
            self._used_bytes = end
            self._has_news.set()

    def close(self) -> None:
        """End it after the slice that it is at."""
        self._is_closed = True
        self._has_news.set()

    def _run(self) -> None:
        while True:
            self._has_news.wait()
            self._has_news.clear()
            while self.touched_bytes < min(self._used_bytes + self._headroom, len(self._memory)):
                count = min(_SLICE_BYTES, len(self._memory) - self.touched_bytes)
                started = time.monotonic()
                if self._is_closed or not populate(self._memory.ctypes.data + self.touched_bytes, count):
                    return
                self.touched_bytes += count
                time.sleep(_REST * (time.monotonic() - started))
            if self._is_closed:
                return
